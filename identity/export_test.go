package identity

// SealName lets tests open an authority's sealed key, as a thief of the
// key-encryption key would.
var SealName = sealName
