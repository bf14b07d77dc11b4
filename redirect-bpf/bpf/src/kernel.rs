// SPDX-License-Identifier: Apache-2.0
//! bpf(2), as far as `aya` leaves it to us: tables of our own layouts, links that live in their pins, and what the
//! kernel says about both.

#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper for any of this")]

use crate::layout::Plain;
use nix::libc;
use std::ffi::CString;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `enum bpf_cmd` of linux/bpf.h.
#[derive(Clone, Copy)]
enum Command {
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    MapNextKey = 4,
    Pin = 6,
    Get = 7,
    Info = 15,
    LinkCreate = 28,
    LinkUpdate = 29,
}

/// `enum bpf_attach_type` of linux/bpf.h.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AttachType {
    Egress = 1,
    SockCreate = 2,
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    SkLookup = 36,
}

/// A number or an address, where the kernel reads one or the other.
#[repr(C)]
struct MapElement {
    map: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoRequest {
    fd: u32,
    length: u32,
    info: u64,
}

/// One attribute for creation and update of links: four numbers each, in the order of linux/bpf.h.
#[repr(C)]
struct LinkNumbers([u32; 4]);

/// What `BPF_OBJ_GET_INFO_BY_FD` tells of a link; `target` is a cgroup's id or a namespace's inode, 0 once that is gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LinkInfo {
    pub program: u32,
    pub target: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MapSizes {
    pub key_bytes: u32,
    pub value_bytes: u32,
}

fn bpf<T>(command: Command, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is a `repr(C)` struct of the command, all of it initialised and without padding, and alive
    // through the call. Every address in it is of memory that the caller keeps alive and that is as large as the kernel
    // was told when the map was made (checked at load) or as the attribute says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_int,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn new_fd(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just opened this descriptor for the call that answered it; descriptors fit an int.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).expose_provenance() as u64
}

/// Where the kernel is to write.
fn place<T>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).expose_provenance() as u64
}

fn element(map: BorrowedFd<'_>, key: u64, value: u64, flags: u64) -> MapElement {
    MapElement {
        map: number(map),
        zero: 0,
        key,
        value,
        flags,
    }
}

/// # Errors
/// As bpf(2); a key that is not there is `Ok(None)`.
pub fn map_lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attributes = element(map, address(key), place(&mut value), 0);
    match bpf(Command::MapLookup, &mut attributes) {
        // SAFETY: the kernel has written all of the value, and every bit pattern of a `Plain` is one.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// # Errors
/// As bpf(2): `E2BIG` when the map is full.
pub fn map_update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    bpf(
        Command::MapUpdate,
        &mut element(map, address(key), address(value), 0),
    )?;
    Ok(())
}

/// # Errors
/// As bpf(2); a key that is not there is no error.
pub fn map_delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    match bpf(Command::MapDelete, &mut element(map, address(key), 0, 0)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The key after `key`, the first one after `None` or after a key that has gone meanwhile.
/// # Errors
/// As bpf(2).
pub fn map_next_key<K: Plain>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = MaybeUninit::<K>::uninit();
    let mut attributes = element(map, key.map_or(0, address), place(&mut next), 0);
    match bpf(Command::MapNextKey, &mut attributes) {
        // SAFETY: the kernel has written all of the key, and every bit pattern of a `Plain` is one.
        Ok(_) => Ok(Some(unsafe { next.assume_init() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn path_of(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// # Errors
/// As bpf(2): `EEXIST` when there is something at `path`.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_of(path)?;
    let mut attributes = Object {
        path: path.as_ptr().expose_provenance() as u64,
        fd: number(object),
        flags: 0,
    };
    bpf(Command::Pin, &mut attributes)?;
    Ok(())
}

/// # Errors
/// As bpf(2): `NotFound` when there is nothing at `path`.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = path_of(path)?;
    let mut attributes = Object {
        path: path.as_ptr().expose_provenance() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(Command::Get, &mut attributes).map(new_fd)
}

/// # Errors
/// As bpf(2).
pub fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    kind: AttachType,
) -> io::Result<OwnedFd> {
    let mut attributes = LinkNumbers([number(program), number(target), kind as u32, 0]);
    bpf(Command::LinkCreate, &mut attributes).map(new_fd)
}

/// Puts another program in a link's place: no packet passes without one.
/// # Errors
/// As bpf(2).
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkNumbers([number(link), number(program), 0, 0]);
    bpf(Command::LinkUpdate, &mut attributes)?;
    Ok(())
}

/// The first `N` numbers of what the kernel tells of an object, the rest cut off.
fn info<const N: usize>(object: BorrowedFd<'_>) -> io::Result<[u32; N]> {
    let mut info = [0u32; N];
    let mut attributes = InfoRequest {
        fd: number(object),
        length: (N * size_of::<u32>()) as u32,
        info: place(&mut info),
    };
    bpf(Command::Info, &mut attributes)?;
    Ok(info)
}

/// # Errors
/// As bpf(2).
pub fn link_info(link: BorrowedFd<'_>, kind: AttachType) -> io::Result<LinkInfo> {
    // Type, id, program, a hole, then the target: 64 bits of a cgroup's id, 32 of a namespace's inode.
    let [_, _, program, _, low, high] = info::<6>(link)?;
    let target = match kind {
        AttachType::SkLookup => low.into(),
        _ => u64::from(high) << 32 | u64::from(low),
    };
    Ok(LinkInfo { program, target })
}

/// # Errors
/// As bpf(2).
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    let [_, id] = info::<2>(program)?;
    Ok(id)
}

/// # Errors
/// As bpf(2).
pub fn map_sizes(map: BorrowedFd<'_>) -> io::Result<MapSizes> {
    let [_, _, key_bytes, value_bytes] = info::<4>(map)?;
    Ok(MapSizes {
        key_bytes,
        value_bytes,
    })
}

/// A proc file system of our own, mounted nowhere: a container's has its `sys` read-only.
/// # Errors
/// As fsopen(2), fsconfig(2) and fsmount(2).
pub fn procfs() -> io::Result<OwnedFd> {
    const CLOEXEC: libc::c_uint = 1;
    const CREATE: libc::c_uint = 6;
    const NOSUID_NODEV_NOEXEC: libc::c_uint = 2 | 4 | 8;
    // SAFETY: the name is a string that ends with a zero and lives for ever.
    let opened = unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), CLOEXEC) };
    let context = checked(opened).map(new_fd)?;
    let none = std::ptr::null::<u8>();
    // SAFETY: this command takes neither key nor value, and the context is open.
    let made = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            CREATE,
            none,
            none,
            0,
        )
    };
    checked(made)?;
    // SAFETY: the call takes numbers only and touches no memory of ours.
    let mounted = unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            CLOEXEC,
            NOSUID_NODEV_NOEXEC,
        )
    };
    checked(mounted).map(new_fd)
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// # Errors
/// As pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(new_fd(fd))
}
