package main

import (
	"io"
	"net"
	"sync"
)

// Connections carried at once, using six descriptors each; more of them wait.
const mostCarried = 128

// forwardTo forwards connections to 127.0.0.1, on the target's port, to the target: the only way out of the sandbox.
func forwardTo(target string) error {
	_, port, err := net.SplitHostPort(target)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		return err
	}
	go func() {
		room := make(chan struct{}, mostCarried)
		for {
			room <- struct{}{}
			connection, err := accept(listener)
			if err != nil {
				return
			}
			go func() {
				carry(connection.(*net.TCPConn), target)
				<-room
			}()
		}
	}()
	return nil
}

func carry(inside *net.TCPConn, target string) {
	defer inside.Close()
	connection, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	outside := connection.(*net.TCPConn)
	defer outside.Close()
	var both sync.WaitGroup
	both.Add(2)
	way := func(to, from *net.TCPConn) {
		defer both.Done()
		if _, err := io.Copy(to, from); err != nil {
			// One side broke off: tell the other rather than leave it waiting.
			inside.Close()
			outside.Close()
		}
		_ = to.CloseWrite()
	}
	go way(outside, inside)
	go way(inside, outside)
	both.Wait()
}
