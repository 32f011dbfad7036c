// Command weft-controller is the global part of a mesh: it keeps the catalog,
// signs identities and answers operators.
package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/cmd/serve"
	"github.com/weftmesh/weft/federation/controller"
	"github.com/weftmesh/weft/federation/store"
)

// version is set by the linker.
var version = "" //nolint:gochecknoglobals // the linker's -X needs a package variable

func main() {
	serve.Main(serve.Program{
		Name:    "weft-controller",
		Summary: "keep a mesh's catalog, sign its identities, answer its operators",
		Version: version,
		Admin:   "127.0.0.1:9901",
	}, define)
}

// settings are the controller's flags.
type settings struct {
	name, trustDomain, region string
	listen, advertise         string
	dataDir, kekFile, admin   string
	endpoints                 []string
	tls                       store.TLSFiles
}

func define(f *serve.Flags) serve.Wire {
	var s settings
	f.StringVar(&s.name, "name", hostLabel(), "`name` of this controller, unique in the mesh")
	f.StringVar(&s.trustDomain, "trust-domain", "", "the mesh's SPIFFE trust `domain`, for example mesh.example.org; it cannot be changed later")
	f.StringVar(&s.region, "region", controller.DefaultRegion, "`region` whose authority signs here")
	f.StringVar(&s.listen, "listen", "127.0.0.1:8443", "`address` where agents and operators connect")
	f.StringVar(&s.advertise, "advertise", "", "`HOST:PORT` that agents and operators are told to connect to (default: the listener's)")
	f.StringVar(&s.dataDir, "data-dir", "weft-controller-data", "`folder` of the embedded etcd and, by default, of the key file")
	f.StringVar(&s.kekFile, "kek-file", "", "`file` with the key that seals the authorities, to be kept apart from backups (default: kek in the data folder)")
	f.StringVar(&s.admin, "admin-credential", "", "`file` of contexts that a new mesh's first admin credential is added to (default: admin.yaml in the data folder)")
	f.Strings(&s.endpoints, "etcd-endpoints", nil, "`URLs` of an external etcd, https://HOST:PORT; none embeds one")
	f.StringVar(&s.tls.CA, "etcd-cafile", "", "PEM `file` of who may be etcd")
	f.StringVar(&s.tls.Cert, "etcd-certfile", "", "PEM `file` of this controller's certificate for etcd")
	f.StringVar(&s.tls.Key, "etcd-keyfile", "", "PEM `file` of its key")
	f.StringVar(&s.tls.ServerName, "etcd-servername", "", "`name` that etcd's certificate must hold (default: the endpoint's host)")
	return s.wire
}

func (s *settings) wire(ctx context.Context, p *serve.Process) ([]serve.Task, error) {
	if s.trustDomain == "" {
		return nil, serve.Usagef("--trust-domain is needed: the mesh's name, for example --trust-domain mesh.example.org")
	}
	td, err := spiffeid.TrustDomainFromString(s.trustDomain)
	if err != nil {
		return nil, serve.Usagef("--trust-domain: %w", err)
	}
	if err := os.MkdirAll(s.dataDir, 0o700); err != nil {
		return nil, serve.Usagef("--data-dir: %w", err)
	}
	if s.kekFile == "" {
		s.kekFile = filepath.Join(s.dataDir, "kek")
	}
	if s.admin == "" {
		s.admin = filepath.Join(s.dataDir, "admin.yaml")
	}
	st := store.Config{Endpoints: s.endpoints, TLS: s.tls}
	if len(s.endpoints) == 0 {
		st.Dir = filepath.Join(s.dataDir, "etcd")
	}
	ln, err := serve.Listen(ctx, "listen", s.listen)
	if err != nil {
		return nil, err
	}
	p.In("", s.region)
	c, err := controller.New(controller.Config{
		Name: s.name, TrustDomain: td, Region: s.region,
		Listener: ln, Advertise: s.advertise, Store: st,
		KEKFile: s.kekFile, AdminCredential: s.admin,
		Clock: p.Clock, Log: p.Log, Metrics: p.Metrics, Version: p.Version,
	})
	if err != nil {
		ln.Close()
		return nil, serve.Usagef("%w", err)
	}
	p.Ready.Add("controller", c.Ready)
	p.Ready.Add("etcd", c.StoreReady)
	return []serve.Task{{Name: "controller", Run: c.Run}}, nil
}

// hostLabel is the machine's name as a DNS label.
func hostLabel() string {
	host, err := os.Hostname()
	if err != nil {
		return "controller"
	}
	label, _, _ := strings.Cut(strings.ToLower(host), ".")
	return label
}
