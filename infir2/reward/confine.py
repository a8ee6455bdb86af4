"""Give up rights for good: Landlock, seccomp and resource limits, through ctypes and without dependencies. Linux only.

A process calls these on itself; children inherit them and nothing takes them back. Imported by the sandbox's launcher
before any untrusted line runs, so this file needs the standard library alone and starts quickly.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct

TYPE_CHECKING = False  # the typing modules would double the time a start takes
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38

# Landlock -------------------------------------------------------------------------------------------------------------
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_READ = 0b1101  # execute, read a file, list a folder
_FILE_ONLY = (1 << 0) | (1 << 1) | (1 << 2) | (1 << 14) | (1 << 15)  # the rights a rule on a plain file may name
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version of the interface


def landlock_version() -> int:
    """Version of the kernel's Landlock interface; 0 where there is none."""
    return max(0, libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def restrict_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """From now on: files under ``readable`` can be read and executed, those under ``writable`` used freely, no others
    opened. TCP is refused too where the kernel knows how. Paths that do not exist are left out. OSError if it fails."""
    version = landlock_version()
    if not version:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock")
    everything = _RIGHTS[max(known for known in _RIGHTS if known <= version)]
    attributes = struct.pack("=Q", everything)
    attributes += struct.pack("=Q", 3) if version >= 4 else b""  # TCP: bind, connect
    attributes += struct.pack("=Q", 3) if version >= 6 else b""  # abstract sockets and signals to outside
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)))
    for path, rights in [*((p, _READ) for p in readable), *((p, everything) for p in writable)]:
        _allow(ruleset, path, rights & everything)
    no_new_privileges()
    _checked(libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _FILE_ONLY
    rule = struct.pack("=Qi", rights, handle)
    try:
        _checked(libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0)))
    finally:
        os.close(handle)


# seccomp --------------------------------------------------------------------------------------------------------------
# System calls by name: number on x86_64, number on aarch64. The first table is what attacks on kernels need and no
# solution of an exercise does; the second is what a process that only computes does not need either.
_DANGEROUS = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "quotactl": (179, 60), "personality": (135, 92), "syslog": (103, 116),
}  # fmt: skip
_ACTING = {
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "pidfd_send_signal": (424, 424), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54),
    "utimensat": (280, 88), "utime": (132, -1), "utimes": (235, -1), "setxattr": (188, 5), "truncate": (76, 45),
    "prlimit64": (302, 261), "landlock_create_ruleset": (444, 444),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH
_NEW_NAMESPACE_FLAGS = 0x7E020000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data; the lower half of the first argument


def seccomp_supported() -> bool:
    """Whether the tables below know this machine."""
    return os.uname().machine in _ARCHITECTURES


def refuse_system_calls(only_compute: bool = False, also: Iterable[str] = ()) -> None:
    """From now on the dangerous system calls fail with EPERM, and sockets are AF_UNIX only (so no vsock or netlink,
    which network namespaces do not hold back). ``only_compute``: also no new programs, signals, changes of owners and
    modes. ``also``: names from the tables (for tests). OSError where it cannot be done.
    """
    if not seccomp_supported():
        raise OSError(errno.ENOSYS, f"no table of system calls for {os.uname().machine}")
    column, arch = _ARCHITECTURES[os.uname().machine]
    tables: Mapping[str, tuple[int, int]] = {**_DANGEROUS, **_ACTING}
    names = [*_DANGEROUS, *(_ACTING if only_compute else ()), *also]
    program = _filter(arch, column, sorted({tables[name][column] for name in names} - {-1}))
    _install(program)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _filter(arch: int, column: int, refused: list[int]) -> list[bytes]:
    refuse = _op(_RETURN, _REFUSE | errno.EPERM)
    program = [_op(_LOAD, _ARCH_AT), _op(_EQUAL, arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER_AT)]
    if column == 0:  # x32 calls carry this bit and would pass the table
        program += [_op(_AT_LEAST, 0x40000000, 0, 1), refuse]
    for number in refused:
        program += [_op(_EQUAL, number, 0, 1), refuse]
    # clone3 hides its flags from the filter: ENOSYS makes the C library use clone
    program += [_op(_EQUAL, _CLONE3[column], 0, 1), _op(_RETURN, _REFUSE | errno.ENOSYS)]
    program += [_op(_EQUAL, _CLONE[column], 0, 4), _op(_LOAD, _ARGUMENT_AT)]
    program += [_op(_ANY_BIT, _NEW_NAMESPACE_FLAGS, 0, 1), refuse, _op(_RETURN, _ALLOW)]
    for call in (_SOCKET, _SOCKETPAIR):  # the kernel makes a pair of any family before it finds that there is none
        program += [_op(_EQUAL, call[column], 0, 4), _op(_LOAD, _ARGUMENT_AT)]
        program += [_op(_EQUAL, 1, 1, 0), refuse, _op(_RETURN, _ALLOW)]
    return [*program, _op(_RETURN, _ALLOW)]


def _install(program: list[bytes]) -> None:
    code = ctypes.create_string_buffer(b"".join(program))
    no_new_privileges()
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    _checked(libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), header, ctypes.c_ulong(0), ctypes.c_ulong(0)))


# limits ---------------------------------------------------------------------------------------------------------------
def limit_resources(
    *, cpu_s: int | None = None, memory_mib: int | None = None, file_mib: int | None = None, files: int | None = None,
    processes: int | None = None,
) -> None:  # fmt: skip
    """Hard limits: CPU seconds, address space and size of a file a process, open files; processes (threads count too)
    of the user in this user namespace. No core dumps. Root of the machine is not bound by ``processes``."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_mib and memory_mib << 20,
        resource.RLIMIT_FSIZE: file_mib and file_mib << 20,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_NPROC: processes,
    }
    for kind, value in wanted.items():
        if value is not None:
            hard = resource.getrlimit(kind)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            later = min(bound + 1, hard) if hard != resource.RLIM_INFINITY else bound + 1
            # the first CPU limit sends SIGXCPU, by which the limit can be told from other ends; the second kills
            resource.setrlimit(kind, (bound, later if kind == resource.RLIMIT_CPU else bound))


def no_new_privileges() -> None:
    """Set-user-id programs give nothing from now on."""
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, *(ctypes.c_ulong(n) for n in (1, 0, 0, 0))))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
