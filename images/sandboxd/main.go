// Command sandboxd is the first process of a sandbox pod's container. It runs the commands of one rollout, each exactly once, and
// ensures that nothing of a command outlives it. It is static and uses only the standard library, so that it works in every image.
//
//	sandboxd install DIR   copies itself to DIR (in an init container)
//	sandboxd serve         serves on port 7070 and on a Unix socket, as process 1
//	sandboxd call          forwards requests from standard input to that socket (through `exec`, if the network is closed)
//	sandboxd held ...      applies a command's limits to itself and becomes the command (started by `serve`)
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// An abstract socket: needs no writable folder, and no command can remove it.
const defaultSocket = "@dagger-sandboxd"

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "install":
		err = install(os.Args[2])
	case len(os.Args) >= 2 && os.Args[1] == "serve":
		err = serve(os.Args[2:])
	case len(os.Args) >= 2 && os.Args[1] == "call":
		err = call(os.Args[2:], os.Stdin, os.Stdout)
	case len(os.Args) >= 5 && os.Args[1] == "held":
		err = becomeHeld(os.Args[2], os.Args[3], os.Args[4:])
	default:
		err = errors.New("usage: sandboxd install DIR | serve [flags] | call [flags]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sandboxd:", err)
		os.Exit(1)
	}
}

// install copies this program to a folder atomically, since an init container may run twice.
func install(folder string) error {
	own, err := os.Executable()
	if err != nil {
		return err
	}
	source, err := os.Open(own)
	if err != nil {
		return err
	}
	defer source.Close()
	partial, err := os.CreateTemp(folder, ".sandboxd-")
	if err != nil {
		return err
	}
	defer os.Remove(partial.Name())
	if _, err = io.Copy(partial, source); err == nil {
		err = partial.Chmod(0o555)
	}
	if closing := partial.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return err
	}
	return os.Rename(partial.Name(), filepath.Join(folder, "sandboxd"))
}

func serve(arguments []string) error {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	listen := flags.String("listen", ":7070", "address to listen on")
	socket := flags.String("socket", defaultSocket, "Unix socket for call; @ is an abstract one")
	forward := flags.String("forward", "", "host:port that commands reach as 127.0.0.1:port")
	limits := limits{}
	flags.IntVar(&limits.processes, "processes", 0, "processes and threads of a command; 0 is no limit")
	flags.IntVar(&limits.memoryMiB, "memory-mib", 0, "memory of a command; 0 is no limit but the pod's")
	flags.IntVar(&limits.fileMiB, "file-mib", 0, "size of one file; 0 is no limit")
	flags.Parse(arguments)
	if os.Getpid() != 1 {
		// It kills every process that it sees.
		return errors.New("serve has to be process 1 of a container: do not share a process namespace with it")
	}
	digest := os.Getenv("DAGGER_TOKEN_SHA256")
	if len(digest) != 64 {
		return errors.New("DAGGER_TOKEN_SHA256 has to hold the SHA-256 of the token in hexadecimal digits")
	}
	hide()
	outlive()
	runtime.GOMAXPROCS(2)
	recruit()
	if os.Getenv("PATH") == "" {
		os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	if err := limits.inherit(); err != nil {
		return err
	}
	if *forward != "" {
		if err := forwardTo(*forward); err != nil {
			return err
		}
	}
	handler := &api{digest: digest, runner: newRunner(limits), files: files{}}
	// Clients without the token get neither much time nor much memory.
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10, ConnContext: withVisitor}
	ended := make(chan error)
	for network, address := range map[string]string{"tcp": *listen, "unix": *socket} {
		listener, err := net.Listen(network, address)
		if err != nil {
			return err
		}
		go func() { ended <- server.Serve(&door{Listener: listener}) }()
	}
	return <-ended
}

// hide keeps commands, which run under the same user, from reading this process's memory and environment, and from tracing it.
func hide() {
	const prSetDumpable = 4
	syscall.RawSyscall(syscall.SYS_PRCTL, prSetDumpable, 0, 0)
}

// outlive catches and drops every signal that would end this process: a command may send them. SIGKILL from inside does not
// reach process 1; the container is ended from outside.
func outlive() {
	dropped := make(chan os.Signal, 64)
	for number := syscall.Signal(1); number < 65; number++ {
		switch number {
		case syscall.SIGURG, syscall.SIGCHLD:
		case syscall.SIGILL, syscall.SIGTRAP, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGSEGV, syscall.SIGSTKFLT, syscall.SIGSYS:
			ignore(number)
		default:
			signal.Notify(dropped, number)
		}
	}
	go func() {
		for range dropped {
		}
	}()
}

// ignore makes the kernel drop a signal that the runtime would otherwise take for its own fault, and exit, if it was sent by other means
// than kill (sigqueue, F_SETSIG). A true fault still ends this process.
func ignore(number syscall.Signal) {
	const sigIgn = 1
	action := [4]uint64{sigIgn} // flags, restorer and mask stay zero
	syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(number), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
}

// threads created at the start; the runtime has a few more.
const threads = 32

// recruit creates in advance all threads that this process may need at once. A command's filter works by thread numbers: it protects
// the threads that exist before the command, and none that are created while it runs.
func recruit() {
	var ready sync.WaitGroup
	ready.Add(threads)
	for i := 0; i < threads; i++ {
		go func() {
			runtime.LockOSThread() // nobody else uses this thread until all of them exist
			defer runtime.UnlockOSThread()
			ready.Done()
			ready.Wait()
		}()
	}
	ready.Wait()
}
