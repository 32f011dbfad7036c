package agent

import (
	"errors"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/manifest"
)

// object is one accepted document of the source: a service or a policy.
type object struct {
	manifest.Document
	service *service // of a Service
}

// objectID names an object within the source: its kind, and namespace/name.
type objectID struct{ kind, name string }

func (o objectID) String() string { return o.kind + " " + o.name }

func idOf(d manifest.Document) objectID { return objectID{d.Kind(), d.Name()} }

// source is the last good content of the folder. It is level-triggered: load
// takes a whole reading of the folder and says anew what there is. It does no
// I/O, and is not safe for concurrent use.
type source struct {
	trustDomain spiffeid.TrustDomain
	cluster     federation.ClusterID
	objects     map[objectID]object
	// full: what the folder does not hold is not offered. False while the folder
	// cannot be read or is empty without being confirmed as such.
	full     bool
	findings []federation.Finding // of the last reading
}

func newSource(td spiffeid.TrustDomain, cluster federation.ClusterID) *source {
	return &source{trustDomain: td, cluster: cluster, objects: make(map[objectID]object)}
}

// savedDocument is an accepted document as the last-good file keeps it.
type savedDocument struct {
	File string `json:"file"`
	YAML string `json:"yaml"`
}

// restore takes documents of an earlier process. They count until the folder
// has been read.
func (s *source) restore(documents []savedDocument) {
	for _, d := range documents {
		good, _ := manifest.Decode(d.File, []byte(d.YAML))
		for _, g := range good {
			s.objects[idOf(g)] = s.object(g)
		}
	}
}

// object takes a document in.
func (s *source) object(d manifest.Document) object {
	if d.Policy != nil {
		d.Policy.ID.Origin = string(s.cluster)
		return object{Document: d}
	}
	return object{Document: d, service: newService(s.trustDomain, s.cluster, d.Service)}
}

// documents are the accepted documents, in the order of their names.
func (s *source) documents() []savedDocument {
	var out []savedDocument
	for _, id := range s.sortedIDs() {
		d := s.objects[id].Document
		saved := savedDocument{File: d.File}
		if d.Policy != nil {
			saved.YAML = string(manifest.EncodePolicy(*d.Policy))
		} else {
			saved.YAML = string(manifest.EncodeService(*d.Service))
		}
		out = append(out, saved)
	}
	return out
}

func (s *source) sortedIDs() []objectID {
	ids := make([]objectID, 0, len(s.objects))
	for id := range s.objects {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b objectID) int { return strings.Compare(a.String(), b.String()) })
	return ids
}

// load takes a reading of the folder.
//
// Files are taken in the order of their names, and an object belongs to the
// first that has it. A document that is not accepted is set aside, and its last
// good version stays; where it cannot be told which object it was, all that its
// file gave last time, and nobody gives now, stays. A folder that cannot be
// read, or has no document at all and no marker that says so, changes nothing.
func (s *source) load(dir string, r folderRead) {
	s.findings = nil
	if r.err != nil {
		s.full = false
		s.find(federation.CodeSourceUnreadable, "folder", dir, "%v: nothing is withdrawn, %d objects stay in use", r.err, len(s.objects))
		return
	}
	next := make(map[objectID]object)
	badFiles := make(map[string]bool)
	badObjects := make(map[objectID]bool)
	documents := 0
	for _, f := range r.files {
		if f.err != nil {
			badFiles[f.name] = true
			documents++
			s.find(fileCode(f.err), "file", f.name, "%v: what it gave before stays in use", f.err)
			continue
		}
		good, bad := manifest.Decode(f.name, f.content)
		documents += len(good) + len(bad)
		for _, e := range bad {
			if e.Name != "" {
				badObjects[objectID{e.Kind, e.Name}] = true
			} else {
				badFiles[f.name] = true
			}
			for _, p := range e.Problems {
				s.find(p.Code, "file", f.name, "document %d: %s: set aside, the last good version stays in use", e.Number, p)
			}
		}
		for _, d := range good {
			if first, taken := next[idOf(d)]; taken {
				s.find(federation.CodeDuplicateService, "file", f.name, "document %d: %s stands in %s already, which counts", d.Number, idOf(d), first.File)
				continue
			}
			next[idOf(d)] = s.object(d)
		}
	}
	if documents == 0 && !r.confirmed && len(s.objects) == 0 {
		// Not full all the same: an agent that has lost its memory with its mount
		// must not withdraw what the controller remembers.
		s.full = false
		s.find(federation.CodeSourceWithout, "folder", dir, "no services in it, and none before")
		return
	}
	if documents == 0 && !r.confirmed {
		s.full = false
		s.find(federation.CodeSourceEmptied, "folder", dir, "no services in it, and no file %s that says that this is meant: nothing is withdrawn, %d objects stay in use", emptyMarker, len(s.objects))
		return
	}
	for id, old := range s.objects {
		if _, ok := next[id]; !ok && (badObjects[id] || badFiles[old.File]) {
			next[id] = old
		}
	}
	s.objects, s.full = next, true
}

// find adds a finding, one for each subject and code: the first.
func (s *source) find(code federation.Code, kind, name, format string, args ...any) {
	f := federation.NewFinding(code, federation.Ref{Kind: kind, Name: name}, format, args...)
	for i, other := range s.findings {
		if other.Code == f.Code && other.Subject == f.Subject {
			if more := " (and others in the same place)"; !strings.HasSuffix(other.Message, more) {
				s.findings[i].Message += more
			}
			return
		}
	}
	s.findings = append(s.findings, f)
}

// services and policies are what the objects say.
func (s *source) services() map[federation.ServiceID]*service {
	out := make(map[federation.ServiceID]*service)
	for _, o := range s.objects {
		if o.service != nil {
			out[o.service.id] = o.service
		}
	}
	return out
}

func (s *source) policies() map[federation.PolicyID]federation.Policy {
	out := make(map[federation.PolicyID]federation.Policy)
	for _, o := range s.objects {
		if o.Policy != nil {
			out[o.Policy.ID] = *o.Policy
		}
	}
	return out
}

// fileCode is the code of the finding about a file that was not read.
func fileCode(err error) federation.Code {
	if errors.Is(err, errTooLarge) {
		return federation.CodeFileTooLarge
	}
	return federation.CodeFileMalformed
}
