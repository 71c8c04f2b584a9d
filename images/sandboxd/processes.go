package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// children starts processes and reaps all that end here: as process 1, also those whose parents ended before them.
type children struct {
	limits  limits
	mu      sync.Mutex
	waiting map[int]chan syscall.WaitStatus
}

func newChildren(limits limits) *children {
	c := &children{limits: limits, waiting: map[int]chan syscall.WaitStatus{}}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	go func() {
		for range ended {
			c.reap()
		}
	}()
	return c
}

func (c *children) reap() {
	for {
		c.mu.Lock()
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		waiter := c.waiting[pid]
		delete(c.waiting, pid)
		c.mu.Unlock()
		if waiter != nil {
			waiter <- status
		}
		if err != syscall.EINTR && (err != nil || pid <= 0) {
			return
		}
	}
}

// start starts a program in its own session; its exit status is sent on the channel. A program that cannot be started is an error,
// and never looks like one that ended.
func (c *children) start(path string, argv []string, attributes *syscall.ProcAttr) (<-chan syscall.WaitStatus, error) {
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	attributes.Files = append(attributes.Files, writer.Fd())
	waiter, err := c.held(path, argv, attributes)
	writer.Close()
	if err != nil {
		return nil, err
	}
	// The pipe is closed once the program has been executed.
	var call string
	var number syscall.Errno
	if said, _ := fmt.Fscan(reader, &call, &number); said == 2 {
		<-waiter
		return nil, os.NewSyscallError(call, number)
	}
	return waiter, nil
}

// held starts a process that limits itself before it executes the program: limits set by the parent could come too late.
func (c *children) held(path string, argv []string, attributes *syscall.ProcAttr) (<-chan syscall.WaitStatus, error) {
	c.mu.Lock() // so that it cannot be reaped before its waiter is registered
	defer c.mu.Unlock()
	// This program's own file, which no command can replace.
	held := append([]string{"sandboxd", "held", strconv.Itoa(c.limits.memoryMiB), path}, argv...)
	pid, err := syscall.ForkExec("/proc/self/exe", held, attributes)
	if err != nil {
		return nil, err
	}
	waiter := make(chan syscall.WaitStatus, 1)
	c.waiting[pid] = waiter
	return waiter, nil
}

// endAll kills every process except this one and guests, and returns when all of them are reaped.
func endAll(patience time.Duration) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if syscall.Kill(-1, 0) == syscall.ESRCH {
			return nil
		}
		left := 0
		// Stop them first, all at one instant, so that none can start another while they are listed.
		_ = syscall.Kill(-1, syscall.SIGSTOP)
		found, err := others()
		if err != nil {
			// Guests cannot be distinguished and are killed too: better than leaving anything of the command.
			_ = syscall.Kill(-1, syscall.SIGKILL)
			left++
		}
		for _, process := range found {
			if process.guest {
				_ = syscall.Kill(process.pid, syscall.SIGCONT)
				continue
			}
			left++
			_ = syscall.Kill(process.pid, syscall.SIGKILL)
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("processes of a command did not die after SIGKILL")
		}
	}
}
