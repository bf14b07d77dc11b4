/* SPDX-License-Identifier: Apache-2.0 */
/* Helper functions of the kernel by their numbers (bpf-helpers(7)), and map definitions, so that clang alone is enough
 * to compile. */
#pragma once

#include "vmlinux.h"

#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))
#define __uint(name, value) int (*name)[value]
#define __type(name, value) typeof(value) *name
#define NULL ((void *)0)
/* One field of a context. The verifier wants each at a fixed offset of the context itself, and the compiler likes to
 * choose between two offsets first. */
#define READ(type, ctx, field)                                                                                         \
	({                                                                                                                 \
		__u64 value_;                                                                                                  \
		asm volatile("%0 = *(" #type " *)(%1 + %2)"                                                                    \
		             : "=r"(value_)                                                                                    \
		             : "r"(ctx), "i"(__builtin_offsetof(typeof(*(ctx)), field)));                                      \
		value_;                                                                                                        \
	})
#define READ_U16(ctx, field) ((__u16)READ(u16, ctx, field))
#define READ_U32(ctx, field) ((__u32)READ(u32, ctx, field))

#define bpf_htons(x) __builtin_bswap16(x)
#define bpf_ntohs(x) __builtin_bswap16(x)
#define bpf_htonl(x) __builtin_bswap32(x)
#define bpf_ntohl(x) __builtin_bswap32(x)
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "built for little-endian machines");

#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_SOCKHASH 18
#define BPF_MAP_TYPE_SK_STORAGE 24
#define BPF_F_NO_PREALLOC 1u
#define BPF_F_CLONE 512u
#define PIN_BY_NAME 1
#define BPF_ANY 0
#define BPF_NOEXIST 1

#define SOL_SOCKET 1
#define SO_MARK 36
#define SOCK_RAW 3
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ECONNREFUSED 111
/* `lo` has this number in every namespace. */
#define LOOPBACK_IFINDEX 1

#define SK_DROP 0
#define SK_PASS 1
#define BPF_SK_STORAGE_GET_F_CREATE 1
#define BPF_SOCK_OPS_TCP_CONNECT_CB 3
#define BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB 5
#define BPF_SOCK_OPS_STATE_CB 10
#define BPF_SOCK_OPS_TCP_LISTEN_CB 11
#define BPF_SOCK_OPS_STATE_CB_FLAG 4
#define BPF_TCP_CLOSE 7

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 length) = (void *)26;
static long (*bpf_setsockopt)(void *ctx, int level, int name, void *value, int length) = (void *)49;
static long (*bpf_sock_ops_cb_flags_set)(struct bpf_sock_ops *ctx, int flags) = (void *)59;
static long (*bpf_sock_hash_update)(struct bpf_sock_ops *ctx, void *map, void *key, __u64 flags) = (void *)70;
static long (*bpf_sk_release)(void *sk) = (void *)86;
static struct bpf_sock *(*bpf_sk_fullsock)(struct bpf_sock *sk) = (void *)95;
static void *(*bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
static __u64 (*bpf_get_netns_cookie)(void *ctx) = (void *)122;
static long (*bpf_sk_assign)(void *ctx, void *sk, __u64 flags) = (void *)124;
static int (*bpf_set_retval)(int retval) = (void *)187;
