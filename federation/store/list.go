package store

import (
	"context"
	"maps"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// listPage is how many keys one request of a list asks for.
const listPage = 500

// listed says where a list was taken.
type listed struct {
	revision int64
	cluster  uint64 // etcd's cluster id
}

// list reads everything below dir at one revision; the newest where at is 0.
// Keys come without the store's prefix.
func (s *Store) list(ctx context.Context, dir string, at int64) (map[string]entry, listed, error) {
	return s.listRange(ctx, s.prefix+dir, clientv3.GetPrefixRangeEnd(s.prefix+dir), at)
}

// listAll reads everything that the watch follows: all but the journal of
// issued identities, which only grows.
func (s *Store) listAll(ctx context.Context, at int64) (map[string]entry, listed, error) {
	issued := s.prefix + dirIssued
	out, where, err := s.listRange(ctx, s.prefix, issued, at)
	if err != nil {
		return nil, listed{}, err
	}
	rest, _, err := s.listRange(ctx, clientv3.GetPrefixRangeEnd(issued), clientv3.GetPrefixRangeEnd(s.prefix), where.revision)
	if err != nil {
		return nil, listed{}, err
	}
	maps.Copy(out, rest)
	return out, where, nil
}

func (s *Store) listRange(ctx context.Context, from, end string, at int64) (_ map[string]entry, _ listed, err error) {
	defer s.metrics.request("list", s.clock.Now(), &err)
	out := make(map[string]entry)
	where := listed{revision: at}
	for {
		resp, err := s.page(ctx, from, end, where.revision)
		if err != nil {
			return nil, listed{}, err
		}
		if where.revision == 0 {
			where.revision = resp.Header.Revision
		}
		where.cluster = resp.Header.ClusterId
		for _, kv := range resp.Kvs {
			out[strings.TrimPrefix(string(kv.Key), s.prefix)] = entryOf(kv)
		}
		if !resp.More {
			return out, where, nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

func (s *Store) page(ctx context.Context, from, end string, at int64) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	resp, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithRev(at), clientv3.WithLimit(listPage))
	if err != nil {
		return nil, s.explain("list", err)
	}
	return resp, nil
}
