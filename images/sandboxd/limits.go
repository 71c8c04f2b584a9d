package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// limits of one command including everything that it starts. What no kernel limit enforces is checked ten times a second.
type limits struct{ processes, memoryMiB, fileMiB int }

const openFiles = 4096

// inherit sets the limits that commands inherit from this process.
func (l limits) inherit() error {
	set := map[int]uint64{syscall.RLIMIT_CORE: 0, syscall.RLIMIT_NOFILE: openFiles}
	if l.fileMiB > 0 {
		set[syscall.RLIMIT_FSIZE] = uint64(l.fileMiB) << 20
	}
	for which, value := range set {
		var held syscall.Rlimit
		if err := syscall.Getrlimit(which, &held); err != nil {
			return fmt.Errorf("getrlimit %d: %w", which, err)
		}
		if value > held.Max {
			value = held.Max
		}
		if err := syscall.Setrlimit(which, &syscall.Rlimit{Cur: value, Max: value}); err != nil {
			return fmt.Errorf("setrlimit %d: %w", which, err)
		}
	}
	return nil
}

// becomeHeld sets what applies to a command but not to the serving process, then becomes the command, whose children inherit it.
// OOM score: if memory runs out, the kernel shall kill a command. Priority: both share the container's CPU time, and without an advantage
// the serving process would not get to check while a thousand others fork. Memory of one process: a fast one would outrun the sampling,
// and with cgroup v2 the kubelet lets the kernel kill a whole container that is out of memory. Filter: see confine.
// On failure the system call and the error number are written to descriptor 3.
func becomeHeld(memoryMiB, path string, argv []string) error {
	err := hold(memoryMiB, path, argv)
	why := err.(*os.SyscallError)
	_, _ = fmt.Fprintf(os.NewFile(3, "status"), "%s %d", why.Syscall, why.Err)
	return err
}

// hold returns with an os.SyscallError, or not at all.
func hold(memoryMiB, path string, argv []string) error {
	syscall.CloseOnExec(3)
	size, err := strconv.ParseUint(memoryMiB, 10, 32)
	if err != nil {
		return os.NewSyscallError("setrlimit", syscall.EINVAL)
	}
	runtime.LockOSThread() // only this thread gets the priority and the filter
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19)
	if size > 0 {
		_ = syscall.Setrlimit(syscall.RLIMIT_DATA, &syscall.Rlimit{Cur: size << 20, Max: size << 20})
	}
	if err := confine(); err != nil {
		return err
	}
	return os.NewSyscallError("execve", syscall.Exec(path, argv, os.Environ()))
}

// exceeded returns which limit the running command exceeds, or an empty string. What cannot be checked counts as exceeded.
func (l limits) exceeded() string {
	if l.processes > 0 {
		if many, err := l.tooMany(); err != nil {
			return blinded(err)
		} else if many {
			return fmt.Sprintf("more than %d processes", l.processes)
		}
	}
	if l.memoryMiB > 0 {
		if used, err := memoryUsed(); err != nil {
			return blinded(err)
		} else if used > int64(l.memoryMiB)<<20 {
			return l.outOfMemory()
		}
	}
	return ""
}

func blinded(err error) string { return fmt.Sprintf("what is needed to look after it (%v)", err) }

// tooMany stops everything at once if there are too many processes, before threads are counted: inspecting them takes a while.
func (l limits) tooMany() (bool, error) {
	pids, err := numbers()
	if err != nil {
		return false, err
	}
	if len(pids) > 2*l.processes {
		_ = syscall.Kill(-1, syscall.SIGSTOP)
		return true, nil
	}
	found, err := others()
	count := 0
	for _, process := range found {
		if !process.guest {
			count += process.threads
		}
	}
	return count > l.processes, err
}

func (l limits) outOfMemory() string { return fmt.Sprintf("more than %d MiB of memory", l.memoryMiB) }

// memoryUsed returns the container's memory other than file cache, in bytes, including shared memory, mapped or not; 0 without a cgroup.
func memoryUsed() (int64, error) {
	v2, err := counters("/sys/fs/cgroup/memory.stat")
	if v2 != nil || err != nil {
		return v2["anon"] + v2["shmem"], err
	}
	v1, err := counters("/sys/fs/cgroup/memory/memory.stat")
	return v1["rss"] + v1["shmem"], err
}

// oomKills returns how many processes of the container the kernel has killed for memory so far.
func oomKills() int64 {
	if v2, _ := counters("/sys/fs/cgroup/memory.events"); v2 != nil {
		return v2["oom_kill"]
	}
	v1, _ := counters("/sys/fs/cgroup/memory/memory.oom_control")
	return v1["oom_kill"]
}

// counters reads a file of lines with a name and a number; nil if it does not exist.
func counters(path string) (map[string]int64, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	found := map[string]int64{}
	for _, line := range strings.Split(string(data), "\n") {
		if name, value, ok := strings.Cut(line, " "); ok {
			found[name], _ = strconv.ParseInt(value, 10, 64)
		}
	}
	return found, nil
}

// process is a process other than ours.
type process struct {
	pid, threads int
	// guest: entered from outside the container (`exec`), so that its parent is not visible here. No command can make itself a guest.
	guest bool
}

// numbers returns the pids of all processes except this one.
func numbers() ([]int, error) {
	folder, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	names, err := folder.Readdirnames(-1)
	var found []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid != 1 {
			found = append(found, pid)
		}
	}
	return found, err
}

// others returns all processes of the container except this one, zombies included.
func others() ([]process, error) {
	pids, err := numbers()
	if err != nil {
		return nil, err
	}
	var found []process
	for _, pid := range pids {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it ended meanwhile
		} else if err != nil {
			return nil, err
		}
		// The fields after the name, which may contain anything: first the state, then the parent; threads is the 18th.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) > 17 {
			threads, _ := strconv.Atoi(string(fields[17]))
			found = append(found, process{pid: pid, threads: threads, guest: string(fields[1]) == "0"})
		}
	}
	return found, nil
}
