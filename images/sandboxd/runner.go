package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// command is a worker's request; see docs/architecture.md, "Sandboxes as pods".
type command struct {
	Command string            `json:"command"`
	Workdir string            `json:"workdir"`
	Timeout float64           `json:"timeout_seconds"`
	Env     map[string]string `json:"env"`
	Limit   int               `json:"output_limit_bytes"`
}

// result is a command's result. Head and Tail are the whole output if Dropped is 0.
type result struct {
	Head     []byte  `json:"head"`
	Tail     []byte  `json:"tail"`
	Dropped  int64   `json:"dropped_bytes"`
	ExitCode int     `json:"exit_code"`
	TimedOut bool    `json:"timed_out"`
	Stopped  string  `json:"stopped,omitempty"` // the limit that it exceeded
	Failed   string  `json:"failed,omitempty"`  // why it could not be run: the sandbox's fault, not the command's
	Seconds  float64 `json:"seconds"`
}

const (
	tick     = 100 * time.Millisecond
	patience = 5 * time.Second
	kept     = 4 // results that can still be fetched

	cannotExecute = 126 // a shell's exit code for a program that exists but does not start
)

// execution is a command that was started, or cancelled before that.
type execution struct {
	cancelled chan struct{}
	once      sync.Once
	done      chan struct{}
	result    result // to be read after done is closed
}

func (e *execution) cancel() { e.once.Do(func() { close(e.cancelled) }) }

// runner runs one command at a time, and each number once.
type runner struct {
	limits   limits
	children *children
	mu       sync.Mutex
	seen     map[uint64]*execution
	latest   uint64
	running  *execution
	begun    bool // whether any command has been started so far
}

func newRunner(limits limits) *runner {
	return &runner{limits: limits, children: newChildren(limits), seen: map[uint64]*execution{}}
}

// The reasons why a number cannot be served.
type (
	busy    struct{}
	outdone struct{}
)

func (busy) Error() string    { return "another command runs: wait for its end, or cancel it" }
func (outdone) Error() string { return "a later number was started: this one's result is gone" }

// start starts a command unless its number was seen; nil instead of a command cancels it, even if it has not arrived yet.
func (r *runner) start(number uint64, command *command) (*execution, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.seen[number]; known != nil {
		return known, nil
	}
	if number <= r.latest {
		return nil, outdone{}
	}
	if r.running != nil && command != nil {
		return nil, busy{}
	}
	started := &execution{cancelled: make(chan struct{}), done: make(chan struct{})}
	r.seen[number], r.latest = started, number
	for old := range r.seen {
		if old+kept <= number {
			delete(r.seen, old)
		}
	}
	if command == nil {
		started.result.ExitCode = 137
		close(started.done)
		return started, nil
	}
	r.running = started
	go func() {
		started.result = r.run(command, started.cancelled)
		r.mu.Lock()
		r.running = nil
		r.mu.Unlock()
		close(started.done)
	}()
	return started, nil
}

func (r *runner) find(number uint64) *execution {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[number]
}

// run runs a command to its end; when it returns, everything that the command started is dead.
func (r *runner) run(command *command, cancelled <-chan struct{}) result {
	began, kills := time.Now(), oomKills()
	output := newBounded(command.Limit)
	ended, drained, err := r.launch(command, output)
	if err != nil && r.begun && spoilt(err) {
		return result{Head: []byte(err.Error() + "\n"), ExitCode: cannotExecute}
	} else if err != nil {
		return result{Failed: err.Error()}
	}
	r.begun = true
	found := result{ExitCode: -1}
	found.TimedOut, found.Stopped = r.watch(ended, command.Timeout, cancelled, &found.ExitCode)
	if err := endAll(patience); err != nil {
		found.Failed = err.Error()
	}
	if found.ExitCode < 0 {
		select {
		case status := <-ended:
			found.ExitCode = exitCode(status)
		case <-time.After(patience):
		}
	}
	select {
	case <-drained:
		found.Head, found.Tail, found.Dropped = output.parts()
	case <-time.After(patience):
		found.Failed = "the output of a command does not end"
	}
	if found.Stopped == "" && !found.TimedOut && oomKills() > kills {
		found.Stopped = r.limits.outOfMemory()
	}
	found.Seconds = time.Since(began).Seconds()
	return found
}

// watch waits until the command ends, is cancelled, misses its deadline or exceeds a limit.
func (r *runner) watch(ended <-chan syscall.WaitStatus, timeout float64, cancelled <-chan struct{}, code *int) (bool, string) {
	deadline := time.NewTimer(time.Duration(timeout * float64(time.Second)))
	defer deadline.Stop()
	look := time.NewTicker(tick)
	defer look.Stop()
	for {
		select {
		case status := <-ended:
			*code = exitCode(status)
			return false, ""
		case <-cancelled:
			return false, ""
		case <-deadline.C:
			return true, ""
		case <-look.C:
			if why := r.limits.exceeded(); why != "" {
				return false, why
			}
		}
	}
}

// spoilt reports whether a command cannot be started because of files. If one could be started before, commands have changed those files
// since: then it is a result, and not the sandbox's fault.
func spoilt(err error) bool {
	causes := []error{
		exec.ErrNotFound, fs.ErrNotExist, fs.ErrPermission, fs.ErrExist,
		syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.ENOEXEC, syscall.ETXTBSY,
	}
	for _, cause := range causes {
		if errors.Is(err, cause) {
			return true
		}
	}
	return false
}

// launch starts a command's shell; drained is closed when the last writer of its output is gone.
func (r *runner) launch(command *command, output io.Writer) (<-chan syscall.WaitStatus, <-chan struct{}, error) {
	shell, err := exec.LookPath("bash")
	if err != nil {
		return nil, nil, fmt.Errorf("the image has no bash in PATH: %w", err)
	}
	// A command may have removed the folder; the next one finds an empty folder, as in every kind of sandbox.
	if err := os.MkdirAll(command.Workdir, 0o755); err != nil {
		return nil, nil, fmt.Errorf("the working directory: %w", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, nil, err
	}
	defer null.Close()
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer writer.Close()
	ended, err := r.children.start(shell, []string{"bash", "-c", command.Command}, &syscall.ProcAttr{
		Dir:   command.Workdir,
		Env:   environment(command.Env),
		Files: []uintptr{null.Fd(), writer.Fd(), writer.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		reader.Close()
		return nil, nil, fmt.Errorf("bash cannot be started: %w", err)
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		defer reader.Close()
		_, _ = io.Copy(output, reader)
	}()
	return ended, drained, nil
}

// environment returns a command's whole environment: PATH and HOME from the image, and what was given, but nothing else of the pod's.
func environment(given map[string]string) []string {
	all := map[string]string{"PATH": os.Getenv("PATH"), "HOME": home(), "LANG": "C.UTF-8"}
	for name, value := range given {
		all[name] = value
	}
	var lines []string
	for name, value := range all {
		lines = append(lines, name+"="+value)
	}
	return lines
}

// home returns the user's own home if it is writable, for git and similar programs.
func home() string {
	const writable = 2
	if path := os.Getenv("HOME"); filepath.IsAbs(path) && path != "/" && syscall.Access(path, writable) == nil {
		return path
	}
	return os.TempDir()
}

func exitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}
