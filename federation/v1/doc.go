// Package federationv1 is Weft's wire and storage format: the protobuf
// messages and services, the code generated from them, and their conversion
// to and from the vocabulary of package federation.
//
// A Record is the one currency: a body under a Key. The same records are stored
// in etcd, carried by Sync and kept in an agent's last good file. Encode
// functions make messages of the vocabulary, and Decode methods read them back;
// what they read may come from anybody, so Decode checks every field, bounds
// every list, and names the field in its error. Nothing behind it sees a name
// that has not been parsed, and a record under a key of one cluster speaks of
// that cluster alone.
//
// Mesh applies records to a catalog and a world. Sums is the digest by which
// two ends of a stream find out in which parts their records differ.
package federationv1
