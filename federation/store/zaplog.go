package store

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapLogger hands etcd's log lines, those of level and worse, to log.
func zapLogger(log *slog.Logger, level zapcore.LevelEnabler) *zap.Logger {
	return zap.New(&slogCore{log: log.With("part", "etcd"), level: level})
}

// slogCore is a zap core that writes to slog.
type slogCore struct {
	log   *slog.Logger
	level zapcore.LevelEnabler
}

func levelOf(l zapcore.Level) slog.Level {
	if l > zapcore.WarnLevel {
		return slog.LevelError
	}
	return slog.LevelWarn
}

func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.level.Enabled(l) && c.log.Enabled(context.Background(), levelOf(l))
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: slog.New(c.log.Handler().WithAttrs(attrs(fields))), level: c.level}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	//nolint:sloglint // the message is etcd's
	c.log.LogAttrs(context.Background(), levelOf(e.Level), e.Message, attrs(fields)...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		if v, ok := enc.Fields[f.Key]; ok {
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}
