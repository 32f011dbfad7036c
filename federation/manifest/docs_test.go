package manifest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftmesh/weft/federation/manifest"
)

// TestDocumentsInDocsAreGood reads every YAML block of the documentation that
// is meant for Weft.
func TestDocumentsInDocsAreGood(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for i, block := range strings.Split(string(text), "```yaml\n")[1:] {
			block, _, _ = strings.Cut(block, "```")
			if !strings.Contains(block, "apiVersion: "+manifest.APIVersion) {
				continue
			}
			found++
			docs, bad := manifest.Decode(page, []byte(block))
			for _, b := range bad {
				t.Errorf("block %d: %v", i+1, b)
			}
			if len(docs) == 0 {
				t.Errorf("%s: block %d holds no document", page, i+1)
			}
		}
	}
	if found < 2 {
		t.Errorf("found %d documents, want those of failover.md and services.md at least", found)
	}
}
