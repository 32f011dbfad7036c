// Package federationv1 is Weft's wire and storage format: the protobuf
// messages and services, the code generated from them, and their conversion
// to and from the vocabulary of package federation.
package federationv1
