/* SPDX-License-Identifier: Apache-2.0 */
/* The maps of one node, pinned by name and shared by all its programs, and the questions asked of them. None of the
 * tables is laid out in advance; when one is full, what does not fit is refused. */
#pragma once

#include "helpers.h"
#include "layout.h"

#define HASH(name, key_type, value_type, entries)                                                                      \
	struct {                                                                                                           \
		__uint(type, BPF_MAP_TYPE_HASH);                                                                               \
		__uint(max_entries, entries);                                                                                  \
		__uint(map_flags, BPF_F_NO_PREALLOC);                                                                          \
		__uint(pinning, PIN_BY_NAME);                                                                                  \
		__type(key, key_type);                                                                                         \
		__type(value, value_type);                                                                                     \
	} name SEC(".maps")

/* By the cookie of the pod's network namespace. */
HASH(pods, __u64, struct pod, 65536);
HASH(pod_counts, __u64, struct pod_counts, 65536);
HASH(pod_addresses, struct pod_address, __u32, 262144);
HASH(pod_ports, struct pod_port, __u32, 262144);
/* Connections past the proxy that were open when capture began, as the pod's socket sees them. */
HASH(older, struct pod_connection, __u32, 1048576);
/* Connections of the proxy in pods, as its sockets see them, until they close. */
HASH(proxy_connections, struct pod_connection, __u32, 4194304);
/* Addresses of announced and mandatory workloads, the node's whole fence. */
HASH(fence, struct ip, __u32, 1048576);

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 262144);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct pod_listener);
	__type(value, __u64);
} listeners SEC(".maps");

/* Sockets that the proxy made, and those accepted from them. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __s32);
	__type(value, __u32);
} proxy_sockets SEC(".maps");

static __always_inline struct ip ipv4(__u32 address)
{
	return (struct ip){{0, 0, bpf_htonl(0xffff), address}};
}

static __always_inline int is_ipv4(const struct ip *ip)
{
	return ip->word[0] == 0 && ip->word[1] == 0 && ip->word[2] == bpf_htonl(0xffff);
}

static __always_inline int is_unspecified(const struct ip *ip)
{
	return is_ipv4(ip) ? ip->word[3] == 0 : !(ip->word[0] | ip->word[1] | ip->word[2] | ip->word[3]);
}

static __always_inline int is_loopback(const struct ip *ip)
{
	if (is_ipv4(ip))
		return (ip->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !(ip->word[0] | ip->word[1] | ip->word[2]) && ip->word[3] == bpf_htonl(1);
}

static __always_inline int is_link_local(const struct ip *ip)
{
	if (is_ipv4(ip))
		return (ip->word[3] & bpf_htonl(0xffff0000)) == bpf_htonl(0xa9fe0000);
	return (ip->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline int is_own_address(__u64 netns, const struct ip *ip)
{
	struct pod_address key = {.netns = netns, .ip = *ip};
	return is_loopback(ip) || bpf_map_lookup_elem(&pod_addresses, &key) != NULL;
}

static __always_inline int has_port(__u64 netns, __u16 port, __u16 kind)
{
	struct pod_port key = {.netns = netns, .port = port, .kind = kind};
	return bpf_map_lookup_elem(&pod_ports, &key) != NULL;
}

static __always_inline int is_fenced(const struct ip *ip, __u32 kind)
{
	__u32 *kinds = bpf_map_lookup_elem(&fence, ip);
	return kinds && (*kinds & kind);
}

#define COUNT(netns, field)                                                                                            \
	do {                                                                                                               \
		struct pod_counts *counts = bpf_map_lookup_elem(&pod_counts, &(netns));                                        \
		if (counts)                                                                                                    \
			__sync_fetch_and_add(&counts->field, 1);                                                                   \
	} while (0)
