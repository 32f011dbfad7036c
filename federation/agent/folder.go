package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/weftmesh/weft/federation/clock"
)

// Bounds of the folder source.
const (
	// emptyMarker in the folder says that an empty folder is meant: only then
	// are the services withdrawn that the folder held before.
	emptyMarker = ".weft-empty"

	sourceFileLimit  = 1 << 20 // bytes of one file
	sourceTotalLimit = 64 << 20
	sourceFiles      = 10_000

	// sourceRescan is how often the folder is read again without an event, for
	// file systems that tell nobody about changes.
	sourceRescan = 10 * time.Second
	// sourceSettle is how long changes are gathered before the folder is read,
	// so that a set of files written one after the other is read once.
	sourceSettle = 50 * time.Millisecond
)

// sourceFile is one YAML file of the folder as it was read: content, or why
// there is none.
type sourceFile struct {
	name    string // in the folder
	content []byte
	err     error
}

// folderRead is what the folder held at one moment.
type folderRead struct {
	files     []sourceFile // sorted by name
	confirmed bool         // emptyMarker is there
	err       error        // the folder itself cannot be read
}

// readFolder reads the YAML files of dir: regular files, or symbolic links to
// some, whose names end in .yaml or .yml and do not begin with a dot. Folders
// below it are not read. It never waits for a FIFO or a device.
func readFolder(dir string) folderRead {
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil {
		return folderRead{err: err}
	}
	var r folderRead
	total := int64(0)
	for _, e := range entries {
		name := e.Name()
		if name == emptyMarker {
			r.confirmed = true
		}
		ext := filepath.Ext(name)
		if strings.HasPrefix(name, ".") || (ext != ".yaml" && ext != ".yml") || e.IsDir() {
			continue
		}
		if len(r.files) == sourceFiles {
			return folderRead{err: fmt.Errorf("more than %d YAML files", sourceFiles)}
		}
		b, err := readRegular(filepath.Join(dir, name), sourceFileLimit)
		if errors.Is(err, fs.ErrNotExist) && e.Type()&fs.ModeSymlink == 0 {
			continue // removed since the folder was listed
		}
		total += int64(len(b))
		if total > sourceTotalLimit {
			return folderRead{err: fmt.Errorf("more than %d bytes of YAML", sourceTotalLimit)}
		}
		r.files = append(r.files, sourceFile{name: name, content: b, err: err})
	}
	return r
}

// watchFolder calls changed once at its start, after each change below dir,
// when asked to, and every sourceRescan, until ctx ends. changed reads the folder itself: events
// say only when, never what. The folder above is watched as well, because dir
// may be missing, or a symbolic link that is swapped.
func watchFolder(ctx context.Context, dir string, c clock.Clock, log *slog.Logger, asked <-chan struct{}, changed func()) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("the source folder's changes are seen by reading it every now and then only", "every", sourceRescan, "error", err)
		watcher = &fsnotify.Watcher{} // its channels never deliver
	} else {
		defer watcher.Close()
	}
	above := filepath.Dir(filepath.Clean(dir))
	watch := func() {
		if err != nil {
			return
		}
		// Adding a path anew is how a folder that was replaced is found. Errors
		// show when the folder is read.
		_ = watcher.Remove(dir)
		_ = watcher.Add(dir)
		_ = watcher.Add(above)
	}
	settle, rescan := c.NewTimer(0), c.NewTimer(sourceRescan)
	defer settle.Stop()
	defer rescan.Stop()
	watch()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-watcher.Events:
			base := filepath.Clean(dir)
			if filepath.Dir(e.Name) != base && filepath.Clean(e.Name) != base {
				continue // a neighbour of the folder
			}
			if e.Op == fsnotify.Chmod && filepath.Clean(e.Name) != base {
				continue
			}
			settle.Reset(sourceSettle)
		case err := <-watcher.Errors:
			log.Debug("watching the source folder", "error", err)
			settle.Reset(sourceSettle)
		case <-asked:
			changed()
		case <-rescan.C():
			watch()
			changed()
			rescan.Reset(sourceRescan)
		case <-settle.C():
			watch()
			changed()
		}
	}
}
