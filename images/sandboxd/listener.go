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
	// Connections at once of whoever did not show the token, by each of the two ways in.
	mostStrangers = 64
	// What the kernel had no room for is tried again after this.
	acceptPause = 50 * time.Millisecond
)

// accept waits for the next connection, whatever the kernel is short of meanwhile: who serves must neither end for that nor spin.
func accept(listener net.Listener) (net.Conn, error) {
	for {
		connection, err := listener.Accept()
		if err == nil || errors.Is(err, net.ErrClosed) {
			return connection, err
		}
		time.Sleep(acceptPause)
	}
}

// door is a listener that commands, which reach it too, cannot keep from others: of too many strangers the first one goes.
type door struct {
	net.Listener
	mu        sync.Mutex
	strangers []*visitor // in the order in which they came
}

// visitor is a connection: a stranger until it shows the token, or is closed.
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

// known takes a connection off the strangers.
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

// withVisitor keeps a connection where those who answer its requests find it.
func withVisitor(ctx context.Context, connection net.Conn) context.Context {
	return context.WithValue(ctx, visitorKey{}, connection)
}

func visitorOf(r *http.Request) *visitor { return r.Context().Value(visitorKey{}).(*visitor) }
