package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// Most connections without the token at once, for each of the two listeners.
	mostStrangers = 64
	// Pause before accepting again after the kernel was short of a resource.
	acceptPause = 50 * time.Millisecond
)

// accept waits for the next connection even if the kernel runs short of resources meanwhile: the server must neither end nor spin then.
func accept(listener net.Listener) (net.Conn, error) {
	for {
		connection, err := listener.Accept()
		if err == nil || errors.Is(err, net.ErrClosed) {
			return connection, err
		}
		time.Sleep(acceptPause)
	}
}

// door is a listener that commands, which can reach it too, cannot block for others: if there are too many strangers, the first is closed.
type door struct {
	net.Listener
	mu        sync.Mutex
	strangers []*visitor // in order of arrival
}

// visitor is a connection: a stranger until it shows the token or is closed.
type visitor struct {
	net.Conn
	door *door
}

func (d *door) Accept() (net.Conn, error) {
	connection, err := accept(d.Listener)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	found := &visitor{connection, d}
	d.strangers = append(d.strangers, found)
	if len(d.strangers) > mostStrangers {
		d.strangers[0].Conn.Close()
		d.strangers = d.strangers[1:]
	}
	return found, nil
}

// known removes a connection from the strangers.
func (v *visitor) known() {
	v.door.mu.Lock()
	defer v.door.mu.Unlock()
	for i, stranger := range v.door.strangers {
		if stranger == v {
			v.door.strangers = append(v.door.strangers[:i], v.door.strangers[i+1:]...)
			return
		}
	}
}

func (v *visitor) Close() error {
	v.known()
	return v.Conn.Close()
}

type visitorKey struct{}

// withVisitor stores a connection in the context of its requests.
func withVisitor(ctx context.Context, connection net.Conn) context.Context {
	return context.WithValue(ctx, visitorKey{}, connection)
}

func visitorOf(r *http.Request) *visitor { return r.Context().Value(visitorKey{}).(*visitor) }
