// Package identity says who is who in a mesh, and proves it.
//
// Every process and workload has one SPIFFE identity in the mesh's trust
// domain (ID scheme in id.go), held as an X.509-SVID whose private key never
// leaves the process that made it. The package covers an identity's whole life:
//
//   - an Authority signs leaves: the root signs one authority per region, a
//     region's authority signs the mesh, and an authority of its own, which is
//     not part of the mesh's bundle, signs people (operators);
//   - Admit decides, as a pure function, which identity an asker may have, and
//     takes nothing but the public key from its CSR;
//   - a JoinToken and a Pin start trust where there is none yet;
//   - a KEK seals authority keys for storage, and a process's own key on its
//     own disk;
//   - a Bundle is what verifiers trust, Denials is whom they refuse all the
//     same;
//   - a Source holds a process's own SVID and bundle, renews them while
//     connections run, and keeps serving what it has when the issuer is away;
//   - a Verifier makes the tls.Configs: TLS 1.3, no resumption, the full chain
//     checked, and the peer authorised on every handshake.
//
// The package does no I/O but TLS verification callbacks and its two kinds of
// files (the key-encryption key and a Source's sealed state). Whatever is
// compared with a time takes it from a clock that is passed in.
package identity
