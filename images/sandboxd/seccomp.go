package main

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"
)

// A command runs as the user of the serving process, and the kernel lets a user change what is the user's own. So a filter refuses
// (EPERM) to set the limits of other processes, and to change the scheduling of those that existed before the command: by either a
// command could escape its limits. It also refuses signals to process 1, which Linux drops and gVisor delivers. Other ways to interfere
// with process 1 are refused because it is not dumpable.

// abi is a system call interface: its architecture mark, and its numbers of the relevant calls.
type abi struct {
	mark, prlimit, setpriority, ioprioSet uint32
	sched                                 []uint32 // setparam, setscheduler, setaffinity, setattr
	signals                               []uint32 // kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
	fcntl                                 []uint32
}

// abis lists a processor's native interface, and that of its 32-bit programs. x32 has the native mark and numbers except for one bit.
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
	// The same on every processor.
	pidfdSendSignal = 424
	// F_SETSIG, a command of fcntl: sets the signal that a file's owner gets, which may be process 1.
	setSignal = 10
	// Offsets in seccomp_data: number, mark, and six arguments of eight bytes. The kernel takes a process number from the lower four.
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

// jump continues with the next instruction plus ifSo or ifNot.
func jump(test uint16, value uint32, ifSo, ifNot int) syscall.SockFilter {
	return syscall.SockFilter{Code: syscall.BPF_JMP | test | syscall.BPF_K, Jt: uint8(ifSo), Jf: uint8(ifNot), K: value}
}

// when applies a check to the given call numbers, with the call's number loaded; other calls continue after it.
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

// standing allows a call if the argument `who` is its own process or one of the command's, whose numbers start with that of its first
// process.
func standing(who, own uint32) program {
	return program{
		load(atArguments + 8*who),
		jump(syscall.BPF_JEQ, 0, 1, 0),
		jump(syscall.BPF_JGE, own, 0, 1),
		answerWith(allow),
		answerWith(refuse),
	}
}

// sparing allows a call unless its first argument is one of the numbers below `first`, which are those of process 1 and its threads.
// Process groups are negative and unaffected. The answer is that no such process exists: to a program that checks whether the process
// named in an old file is alive, EPERM would mean that it is.
func sparing(first uint32) program {
	return program{
		load(atArguments),
		jump(syscall.BPF_JEQ, 0, 2, 0),
		jump(syscall.BPF_JGE, first, 1, 0),
		answerWith(nobody),
		answerWith(allow),
	}
}

// unlessUser is for calls whose first argument determines what the second one is: a user, which would include process 1, is refused.
func unlessUser(user uint32, check program) program {
	return append(program{load(atArguments), jump(syscall.BPF_JEQ, user, 0, 1), answerWith(refuse)}, check...)
}

// filter returns the program for a command whose first process is `own`.
func filter(own uint32, known []abi) program {
	const prioUser, ioprioUser = 2, 3
	// A fixed number: when process numbers wrap around, a command must be able to end its own processes numbered below its first one.
	first := uint32(threads + 32)
	if own < first {
		first = own
	}
	found := program{load(atMark)}
	for _, one := range known {
		calls := program{load(atNumber), {Code: syscall.BPF_ALU | syscall.BPF_AND | syscall.BPF_K, K: ^uint32(x32Bit)}}
		// The same call reads limits if given no new ones. Any thread's number sets those of its process: allow only the command's own.
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
		// It identifies a process by a file, and no filter sees which: pretend that the kernel is older.
		calls = append(calls, when([]uint32{pidfdSendSignal}, program{answerWith(absent)})...)
		calls = append(calls, when([]uint32{one.setpriority}, unlessUser(prioUser, standing(1, own)))...)
		calls = append(calls, when([]uint32{one.ioprioSet}, unlessUser(ioprioUser, standing(1, own)))...)
		calls = append(calls, answerWith(allow))
		found = append(append(found, jump(syscall.BPF_JEQ, one.mark, 0, len(calls))), calls...)
	}
	return append(found, answerWith(absent))
}

// confine sets the filter for this thread, and for everything that it becomes and starts.
func confine() error {
	const (
		prSetNoNewPrivs = 38
		setModeFilter   = 1
		// Without it older kernels slow down every program of a command, for the sake of programs that filter themselves. Even older
		// kernels, and gVisor, do not know this flag and refuse it.
		flagSpecAllow = 4
	)
	if abis[runtime.GOARCH] == nil {
		return os.NewSyscallError("seccomp", syscall.ENOSYS) // the calls to refuse are unknown for this processor
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
