/* SPDX-License-Identifier: Apache-2.0 */
/* What the programs and user space share, byte for byte: `src/layout.rs` is the other half, and both assert sizes and
 * offsets. A change here is a new number in the path that maps and links are pinned under (`Layout`).
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are in host order. */
#pragma once

#include "vmlinux.h"

#define OUTBOUND_PORT 15001
#define INBOUND_PORT 15006
#define HBONE_PORT 15008
/* On a socket whose packets are to be routed over `lo`. */
#define MARK 0x53a
/* On a socket of the proxy that is captured all the same: verification's. */
#define VERIFY_MARK 0x53c

/* pod.flags */
#define CAPTURING 1u
#define FENCED 2u
#define REFUSES_PLAIN 4u
/* The pod has an address of this family that connections can begin at. */
#define HAS_IPV4 8u
#define HAS_IPV6 16u

/* pod_port.kind */
#define EXCLUDED_OUTBOUND 0
#define EXCLUDED_INBOUND 1
#define PLAIN_INBOUND 2

/* Values of `fence`. */
#define ENROLLED 1u
#define MANDATORY 2u

/* Values of `proxy_connections`. */
#define CARRIED 1u

struct ip {
	__u32 word[4];
};

struct pod {
	__u32 flags;
	/* Three sysctls as they were before us, and a bit that says that they are recorded; only user space looks. */
	__u32 sysctls;
};

/* A pod's own addresses. */
struct pod_address {
	__u64 netns;
	struct ip ip;
};

struct pod_port {
	__u64 netns;
	__u16 port;
	__u16 kind;
	__u32 zero;
};

/* A connection as the socket sees it that it is about. */
struct pod_connection {
	__u64 netns;
	struct ip local_ip;
	struct ip remote_ip;
	__u16 local_port;
	__u16 remote_port;
	__u32 zero;
};

struct pod_listener {
	__u64 netns;
	__u16 port;
	__u16 is_ipv6;
	__u32 zero;
};

struct pod_counts {
	/* Packets that the fence refused. */
	__u64 fence_out;
	__u64 fence_in;
	__u64 lost_reply;
	/* SYNs that found no listener of the proxy. */
	__u64 no_listener;
	/* Connections of the pod in the proxy's hands now. */
	__s64 carried;
	/* Connections that came to the proxy's listeners since capture began. */
	__u64 captured;
};

_Static_assert(sizeof(struct pod) == 8, "pod");
_Static_assert(sizeof(struct pod_address) == 24, "pod_address");
_Static_assert(sizeof(struct pod_port) == 16, "pod_port");
_Static_assert(sizeof(struct pod_connection) == 48, "pod_connection");
_Static_assert(__builtin_offsetof(struct pod_connection, local_port) == 40, "pod_connection.local_port");
_Static_assert(sizeof(struct pod_listener) == 16, "pod_listener");
_Static_assert(sizeof(struct pod_counts) == 48, "pod_counts");
