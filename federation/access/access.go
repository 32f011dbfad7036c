// Package access is the file that lets a person's tools reach a mesh: named
// contexts, each with the controllers' addresses, what to trust and a client
// credential. The controller writes the first one; the CLI reads and extends
// them.
package access

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"sigs.k8s.io/yaml"
)

// EnvFile names the file to use in place of the default.
const EnvFile = "WEFT_CONTEXTS"

// Config is the whole file.
type Config struct {
	APIVersion     string    `json:"apiVersion"` // weft.dev/v1
	Kind           string    `json:"kind"`       // Config
	CurrentContext string    `json:"currentContext,omitempty"`
	Contexts       []Context `json:"contexts,omitempty"`
}

// Context is one mesh and one credential for it.
type Context struct {
	Name        string   `json:"name"`
	TrustDomain string   `json:"trustDomain"`
	Controllers []string `json:"controllers"` // HOST:PORT
	// CA holds the mesh's roots, PEM. A controller must present an SVID of the
	// trust domain that leads to one of them.
	CA string `json:"ca"`
	// Operator is the name that the certificate stands for.
	Operator    string `json:"operator"`
	Certificate string `json:"certificate"` // PEM chain, leaf first
	Key         Secret `json:"key"`         // PEM, PKCS #8
}

// Secret is text that prints only into the file itself.
type Secret string

// String hides the secret.
func (Secret) String() string { return "(hidden)" }

// GoString hides the secret.
func (Secret) GoString() string { return "(hidden)" }

// LogValue hides the secret.
func (Secret) LogValue() slog.Value { return slog.StringValue("(hidden)") }

// DefaultPath is $WEFT_CONTEXTS, else weft/contexts.yaml in the user's
// configuration folder.
func DefaultPath() (string, error) {
	if p := os.Getenv(EnvFile); p != "" {
		return p, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("no folder for the configuration: %w; set %s", err, EnvFile)
	}
	return filepath.Join(dir, "weft", "contexts.yaml"), nil
}

// Load reads a file. A missing file is an empty Config, so that the first
// context can be added to it.
func Load(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Config{APIVersion: "weft.dev/v1", Kind: "Config"}, nil
	}
	if err != nil {
		return nil, err
	}
	var c Config
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if c.APIVersion != "weft.dev/v1" || c.Kind != "Config" {
		return nil, fmt.Errorf("%s: apiVersion and kind are %q and %q, want weft.dev/v1 and Config", path, c.APIVersion, c.Kind)
	}
	return &c, nil
}

// Save writes the file whole, readable by its owner only: a crash leaves the
// old file or the new one.
func (c *Config) Save(path string) error {
	data, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".config-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// Context finds a context: the named one, or the current one for "".
func (c *Config) Context(name string) (*Context, error) {
	if len(c.Contexts) == 0 {
		return nil, errors.New("no context yet: a controller writes the first one when it starts (see --admin-credential), or use --contexts FILE")
	}
	if name == "" {
		name = c.CurrentContext
	}
	i := slices.IndexFunc(c.Contexts, func(x Context) bool { return x.Name == name })
	if i < 0 {
		names := make([]string, len(c.Contexts))
		for i, x := range c.Contexts {
			names[i] = x.Name
		}
		return nil, fmt.Errorf("no context %q; there are %q: choose one with --context", name, names)
	}
	return &c.Contexts[i], nil
}

// Put adds x, or replaces the context of its name if it is of the same mesh.
// The first context becomes the current one. A context of another mesh is
// never overwritten: it is an error.
func (c *Config) Put(x Context) error {
	i := slices.IndexFunc(c.Contexts, func(o Context) bool { return o.Name == x.Name })
	switch {
	case i < 0:
		c.Contexts = append(c.Contexts, x)
	case c.Contexts[i].CA == x.CA && c.Contexts[i].TrustDomain == x.TrustDomain:
		c.Contexts[i] = x
	default:
		return fmt.Errorf("context %q belongs to another mesh (trust domain %s): choose another name or file", x.Name, c.Contexts[i].TrustDomain)
	}
	if c.CurrentContext == "" {
		c.CurrentContext = x.Name
	}
	return nil
}
