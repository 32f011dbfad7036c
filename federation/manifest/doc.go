// Package manifest reads and writes what people hand to Weft in YAML:
// documents of apiVersion weft.dev/v1 and kind FailoverPolicy or Service.
//
// Reading is strict. A field that does not exist, stands twice or has a value
// that is not allowed sets its document aside, with every such field named by
// line and path; the other documents of the file count. Files come from anybody
// who may write to a folder, so their size, number of documents, nesting and
// aliases are bounded before anything is made of them.
package manifest
