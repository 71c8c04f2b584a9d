package main

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"
)

// A command runs as the user of the process that serves, and the kernel lets a user change what is the user's own. So a filter refuses
// (EPERM) to set the limits of other processes, and to change how those are scheduled that were there before the command: by either a
// command could get rid of what holds it. It refuses signals to process 1 too, which Linux drops and gVisor delivers. What else would reach
// into process 1 is refused because that is not dumpable.

// abi is a way into the kernel: its mark, and its numbers of the calls that matter.
type abi struct {
	mark, prlimit, setpriority, ioprioSet uint32
	sched                                 []uint32 // setparam, setscheduler, setaffinity, setattr
	signals                               []uint32 // kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
	fcntl                                 []uint32
}

// abis are those of a processor: its own, and the one of its 32-bit programs. x32 has its own's mark and numbers, but for a bit.
var abis = map[string][]abi{
	"amd64": {
		{0xc000003e, 302, 141, 251, []uint32{142, 144, 203, 314}, []uint32{62, 200, 234, 129, 297}, []uint32{72}},
		{0x40000003, 340, 97, 289, []uint32{154, 156, 241, 351}, []uint32{37, 238, 270, 178, 335}, []uint32{55, 221}},
	},
	"arm64": {
		{0xc00000b7, 261, 140, 30, []uint32{118, 119, 122, 274}, []uint32{129, 130, 131, 138, 240}, []uint32{25}},
		{0x40000028, 369, 97, 314, []uint32{154, 156, 241, 380}, []uint32{37, 238, 268, 178, 363}, []uint32{55, 221}},
	},
}

var sysSeccomp = map[string]uintptr{"amd64": 317, "arm64": 277}

const (
	x32Bit = 0x40000000
	// The same for every processor.
	pidfdSendSignal = 424
	// F_SETSIG, a command of fcntl: which signal the owner of a file gets, who may be process 1.
	setSignal = 10
	// Of seccomp_data: the number, the mark, the six arguments of eight bytes. The kernel takes a process's number from the lower four.
	atNumber, atMark, atArguments = 0, 4, 16

	allow  = 0x7fff0000
	refuse = 0x00050000 | uint32(syscall.EPERM)
	absent = 0x00050000 | uint32(syscall.ENOSYS)
	nobody = 0x00050000 | uint32(syscall.ESRCH)
)

type program []syscall.SockFilter

func load(at uint32) syscall.SockFilter {
	return syscall.SockFilter{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: at}
}

func answerWith(what uint32) syscall.SockFilter {
	return syscall.SockFilter{Code: syscall.BPF_RET | syscall.BPF_K, K: what}
}

// jump goes on with the next instruction, or with one of those after it.
func jump(test uint16, value uint32, ifSo, ifNot int) syscall.SockFilter {
	return syscall.SockFilter{Code: syscall.BPF_JMP | test | syscall.BPF_K, Jt: uint8(ifSo), Jf: uint8(ifNot), K: value}
}

// when is a check for some calls' numbers, which are at hand; with any other what follows has its turn.
func when(numbers []uint32, check program) program {
	var found program
	for i, number := range numbers {
		rest := len(numbers) - 1 - i
		ifNot := 0
		if rest == 0 {
			ifNot = len(check)
		}
		found = append(found, jump(syscall.BPF_JEQ, number, rest, ifNot))
	}
	return append(found, check...)
}

// standing lets a call through where the argument `who` is its own process or one of the command's, which are numbered from the first
// one's.
func standing(who, own uint32) program {
	return program{
		load(atArguments + 8*who),
		jump(syscall.BPF_JEQ, 0, 1, 0),
		jump(syscall.BPF_JGE, own, 0, 1),
		answerWith(allow),
		answerWith(refuse),
	}
}

// sparing lets a call through unless its first argument is one of the numbers below `first`, which are process 1's and its threads'. Groups
// are negative ones, and not that. As if nobody had that number: for who looks whether the process of an old file lives, EPERM means that
// it does.
func sparing(first uint32) program {
	return program{
		load(atArguments),
		jump(syscall.BPF_JEQ, 0, 2, 0),
		jump(syscall.BPF_JGE, first, 1, 0),
		answerWith(nobody),
		answerWith(allow),
	}
}

// unlessUser is a check where the first argument says what the second one is: one that is a user means process 1 as well.
func unlessUser(user uint32, check program) program {
	return append(program{load(atArguments), jump(syscall.BPF_JEQ, user, 0, 1), answerWith(refuse)}, check...)
}

// filter is the program for a command whose first process is `own`.
func filter(own uint32, known []abi) program {
	const prioUser, ioprioUser = 2, 3
	// A fixed one: where numbers begin anew, a command has to end its own processes that are numbered below its first one.
	first := uint32(threads + 32)
	if own < first {
		first = own
	}
	found := program{load(atMark)}
	for _, one := range known {
		calls := program{load(atNumber), {Code: syscall.BPF_ALU | syscall.BPF_AND | syscall.BPF_K, K: ^uint32(x32Bit)}}
		// The same call reads limits, given no new ones. Any thread's number sets those of its process: only the command's own one passes.
		calls = append(calls, when([]uint32{one.prlimit}, program{
			load(atArguments),
			jump(syscall.BPF_JEQ, 0, 5, 0),
			jump(syscall.BPF_JEQ, own, 4, 0),
			load(atArguments + 8*2),
			jump(syscall.BPF_JEQ, 0, 0, 3),
			load(atArguments + 8*2 + 4),
			jump(syscall.BPF_JEQ, 0, 0, 1),
			answerWith(allow),
			answerWith(refuse),
		})...)
		calls = append(calls, when(one.sched, standing(0, own))...)
		calls = append(calls, when(one.signals, sparing(first))...)
		calls = append(calls, when(one.fcntl, program{
			load(atArguments + 8),
			jump(syscall.BPF_JEQ, setSignal, 0, 1),
			answerWith(refuse),
			answerWith(allow),
		})...)
		// It takes a file for a process, and no filter sees which: as if the kernel were older.
		calls = append(calls, when([]uint32{pidfdSendSignal}, program{answerWith(absent)})...)
		calls = append(calls, when([]uint32{one.setpriority}, unlessUser(prioUser, standing(1, own)))...)
		calls = append(calls, when([]uint32{one.ioprioSet}, unlessUser(ioprioUser, standing(1, own)))...)
		calls = append(calls, answerWith(allow))
		found = append(append(found, jump(syscall.BPF_JEQ, one.mark, 0, len(calls))), calls...)
	}
	return append(found, answerWith(absent))
}

// confine sets the filter for this thread, and for all that it becomes and starts.
func confine() error {
	const (
		prSetNoNewPrivs = 38
		setModeFilter   = 1
		// Without it older kernels make every program of a command slower, for the sake of programs that filter themselves. Kernels
		// older yet, and gVisor, do not know it, and refuse what they do not know.
		flagSpecAllow = 4
	)
	if abis[runtime.GOARCH] == nil {
		return os.NewSyscallError("seccomp", syscall.ENOSYS) // which calls to refuse is not known for this processor
	}
	instructions := filter(uint32(os.Getpid()), abis[runtime.GOARCH])
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetNoNewPrivs, 1, 0, 0, 0, 0); errno != 0 {
		return os.NewSyscallError("prctl", errno)
	}
	compiled := syscall.SockFprog{Len: uint16(len(instructions)), Filter: &instructions[0]}
	var errno syscall.Errno
	for _, flags := range []uintptr{flagSpecAllow, 0} {
		_, _, errno = syscall.RawSyscall(sysSeccomp[runtime.GOARCH], setModeFilter, flags, uintptr(unsafe.Pointer(&compiled)))
		if errno != syscall.EINVAL {
			break
		}
	}
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	return nil
}
