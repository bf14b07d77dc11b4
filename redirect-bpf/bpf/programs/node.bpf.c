// SPDX-License-Identifier: Apache-2.0
/* The programs that a node has once: at the root of the cgroup hierarchy, where every process of every pod passes, and
 * at the proxy's own cgroup. A pod is known by the cookie of its network namespace. */
#include "maps.h"

#define ALLOW 1
#define REFUSE 0
/* IPv6 extension headers looked through before a packet counts as one that cannot be read. */
#define MAX_EXTENSIONS 6

/* At the proxy's cgroup: whose socket it is, is decided by who makes it. */
SEC("cgroup/sock_create")
int own_socket(struct bpf_sock *ctx)
{
	__u32 one = 1;
	return bpf_sk_storage_get(&proxy_sockets, ctx, &one, BPF_SK_STORAGE_GET_F_CREATE) ? ALLOW : REFUSE;
}

static __always_inline struct pod_connection connection_of(struct bpf_sock_ops *ctx, __u64 netns)
{
	struct pod_connection it = {.netns = netns};

	if (READ_U32(ctx, family) == AF_INET) {
		it.local_ip = ipv4(READ_U32(ctx, local_ip4));
		it.remote_ip = ipv4(READ_U32(ctx, remote_ip4));
	} else {
		it.local_ip.word[0] = READ_U32(ctx, local_ip6[0]);
		it.local_ip.word[1] = READ_U32(ctx, local_ip6[1]);
		it.local_ip.word[2] = READ_U32(ctx, local_ip6[2]);
		it.local_ip.word[3] = READ_U32(ctx, local_ip6[3]);
		it.remote_ip.word[0] = READ_U32(ctx, remote_ip6[0]);
		it.remote_ip.word[1] = READ_U32(ctx, remote_ip6[1]);
		it.remote_ip.word[2] = READ_U32(ctx, remote_ip6[2]);
		it.remote_ip.word[3] = READ_U32(ctx, remote_ip6[3]);
	}
	it.local_port = READ_U32(ctx, local_port);
	it.remote_port = bpf_ntohl(READ_U32(ctx, remote_port));
	return it;
}

/* A connection needs our rules if its socket has an address here that is not the pod's, or if it came by capture. */
static __always_inline void remember(struct bpf_sock_ops *ctx, __u64 netns, int accepted)
{
	struct pod_connection it = connection_of(ctx, netns);
	__u32 value = 0;

	if (accepted ? it.local_port != HBONE_PORT : !is_own_address(netns, &it.local_ip))
		value = CARRIED;
	bpf_sock_ops_cb_flags_set(ctx, READ_U32(ctx, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG);
	if (bpf_map_update_elem(&proxy_connections, &it, &value, BPF_NOEXIST) || !value)
		return;
	COUNT(netns, carried);
	if (accepted)
		COUNT(netns, captured);
}

static __always_inline void forget(struct bpf_sock_ops *ctx, __u64 netns)
{
	struct pod_connection it = connection_of(ctx, netns);
	__u32 *found = bpf_map_lookup_elem(&proxy_connections, &it);
	struct pod_counts *counts;
	__u32 value;

	if (!found)
		return;
	value = *found;
	if (bpf_map_delete_elem(&proxy_connections, &it) || value != CARRIED)
		return;
	counts = bpf_map_lookup_elem(&pod_counts, &netns);
	if (counts)
		__sync_fetch_and_add(&counts->carried, -1);
}

/* At the proxy's cgroup: its listeners enter the table that capture picks from, its connections the one that tells them
 * from a client's with the same address. A connection stays there until its socket closes: under SYN cookies the
 * application's side looks for its listener once more with the last segment of the handshake. */
SEC("sockops")
int own_connections(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	__u32 port = READ_U32(ctx, local_port);

	switch (READ_U32(ctx, op)) {
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		if (port == OUTBOUND_PORT || port == INBOUND_PORT) {
			struct pod_listener key = {.netns = netns, .port = port, .is_ipv6 = READ_U32(ctx, family) == AF_INET6};
			bpf_sock_hash_update(ctx, &listeners, &key, BPF_ANY);
		}
		break;
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (bpf_map_lookup_elem(&pods, &netns))
			remember(ctx, netns, 0);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (bpf_map_lookup_elem(&pods, &netns))
			remember(ctx, netns, 1);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (READ_U32(ctx, args[1]) == BPF_TCP_CLOSE)
			forget(ctx, netns);
		break;
	}
	return 1;
}

static __always_inline int is_proxys(struct bpf_sock *sk)
{
	return sk && bpf_sk_storage_get(&proxy_sockets, sk, NULL, 0);
}

static __always_inline int is_tcp(struct bpf_sock_addr *ctx)
{
	__u32 protocol = READ_U32(ctx, protocol);
	return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
}

static __always_inline struct ip dialled_ipv6(struct bpf_sock_addr *ctx)
{
	struct ip ip;

	ip.word[0] = READ_U32(ctx, user_ip6[0]);
	ip.word[1] = READ_U32(ctx, user_ip6[1]);
	ip.word[2] = READ_U32(ctx, user_ip6[2]);
	ip.word[3] = READ_U32(ctx, user_ip6[3]);
	return ip;
}

static __always_inline int mark(struct bpf_sock_addr *ctx, __u32 value)
{
	return bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &value, sizeof(value)) ? REFUSE : ALLOW;
}

static __always_inline int is_captured(__u64 netns, __u32 flags, const struct ip *ip, __u16 port)
{
	return flags & CAPTURING && flags & (is_ipv4(ip) ? HAS_IPV4 : HAS_IPV6) && !is_unspecified(ip) &&
	       !is_link_local(ip) && !is_own_address(netns, ip) && !has_port(netns, port, EXCLUDED_OUTBOUND);
}

/* Sends a new connection over `lo`, by a mark that overrides the application's. The proxy's own connections to the
 * application get it too, so that the answers come back over `lo` whatever address they are for. */
static __always_inline int capture(struct bpf_sock_addr *ctx, const struct ip *ip)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct bpf_sock *sk = ctx->sk;

	if (!pod || !sk || !is_tcp(ctx))
		return ALLOW;
	if (is_proxys(sk) && sk->mark != VERIFY_MARK)
		return is_own_address(netns, ip) ? mark(ctx, MARK) : ALLOW;
	if (is_captured(netns, pod->flags, ip, bpf_ntohs(READ_U32(ctx, user_port))))
		return mark(ctx, MARK);
	/* Left from an earlier connection of the same socket. */
	return sk->mark == MARK ? mark(ctx, 0) : ALLOW;
}

SEC("cgroup/connect4")
int capture_ipv4(struct bpf_sock_addr *ctx)
{
	struct ip ip = ipv4(READ_U32(ctx, user_ip4));
	return capture(ctx, &ip);
}

SEC("cgroup/connect6")
int capture_ipv6(struct bpf_sock_addr *ctx)
{
	struct ip ip = dialled_ipv6(ctx);
	return capture(ctx, &ip);
}

/* Each path of a multipath connection is opened by the kernel, past the hooks in connect(): here, a moment before its SYN.
 * A mark that is new has it routed again. */
SEC("sockops")
int capture_paths(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	__u32 value = MARK;
	struct pod_connection it;
	struct bpf_sock *sk;
	struct pod *pod;

	if (READ_U32(ctx, op) != BPF_SOCK_OPS_TCP_CONNECT_CB)
		return 1;
	pod = bpf_map_lookup_elem(&pods, &netns);
	sk = ctx->sk;
	if (!pod || !sk || sk->mark == MARK || is_proxys(sk))
		return 1;
	it = connection_of(ctx, netns);
	if (is_own_address(netns, &it.local_ip) && is_captured(netns, pod->flags, &it.remote_ip, it.remote_port))
		bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &value, sizeof(value));
	return 1;
}

/* The fence tells an application at once what it would otherwise learn from its SYNs' silence. It stands behind capture
 * in the order of programs, and asks of it nothing but the mark. */
static __always_inline int refuse(struct bpf_sock_addr *ctx, const struct ip *ip)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct bpf_sock *sk = ctx->sk;

	if (!pod || !(pod->flags & FENCED) || !sk || !is_tcp(ctx) || sk->mark == MARK || !is_fenced(ip, ENROLLED) ||
	    is_proxys(sk) || is_own_address(netns, ip) ||
	    has_port(netns, bpf_ntohs(READ_U32(ctx, user_port)), EXCLUDED_OUTBOUND))
		return ALLOW;
	COUNT(netns, fence_out);
	bpf_set_retval(-ECONNREFUSED);
	return REFUSE;
}

SEC("cgroup/connect4")
int fence_ipv4(struct bpf_sock_addr *ctx)
{
	struct ip ip = ipv4(READ_U32(ctx, user_ip4));
	return refuse(ctx, &ip);
}

SEC("cgroup/connect6")
int fence_ipv6(struct bpf_sock_addr *ctx)
{
	struct ip ip = dialled_ipv6(ctx);
	return refuse(ctx, &ip);
}

enum kind { NOT_TCP, TCP, UNREADABLE };

struct segment {
	struct ip source;
	struct ip destination;
	__u32 source_port;
	__u32 destination_port;
	__u32 is_syn;
	__u32 is_reset;
	__u32 has_payload;
};

static __always_inline enum kind read_tcp(struct __sk_buff *skb, __u32 offset, struct segment *it)
{
	__u8 header[14];

	if (bpf_skb_load_bytes(skb, offset, header, sizeof(header)))
		return UNREADABLE;
	it->source_port = header[0] << 8 | header[1];
	it->destination_port = header[2] << 8 | header[3];
	it->is_syn = header[13] & 2;
	it->is_reset = header[13] & 4;
	it->has_payload = READ_U32(skb, len) > offset + (header[12] >> 4) * 4;
	return TCP;
}

static __always_inline enum kind read_ipv4(struct __sk_buff *skb, struct segment *it)
{
	__u8 header[20];
	__u32 source, destination;

	if (bpf_skb_load_bytes(skb, 0, header, sizeof(header)))
		return UNREADABLE;
	__builtin_memcpy(&source, header + 12, 4);
	__builtin_memcpy(&destination, header + 16, 4);
	it->source = ipv4(source);
	it->destination = ipv4(destination);
	if (header[9] != IPPROTO_TCP)
		return NOT_TCP;
	/* A later part of a segment in fragments has no ports. */
	if ((header[6] & 0x1f) | header[7])
		return UNREADABLE;
	return read_tcp(skb, (header[0] & 0xf) * 4, it);
}

static __always_inline enum kind read_ipv6(struct __sk_buff *skb, struct segment *it)
{
	__u32 offset = 40;
	__u8 header[40];
	__u8 next;

	if (bpf_skb_load_bytes(skb, 0, header, sizeof(header)))
		return UNREADABLE;
	__builtin_memcpy(&it->source, header + 8, 16);
	__builtin_memcpy(&it->destination, header + 24, 16);
	next = header[6];
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 extension[4];

		if (next == IPPROTO_TCP)
			return read_tcp(skb, offset, it);
		/* Hop-by-hop, routing, fragment, destination options. */
		if (next != 0 && next != 43 && next != 44 && next != 60)
			return NOT_TCP;
		if (bpf_skb_load_bytes(skb, offset, extension, sizeof(extension)))
			return UNREADABLE;
		if (next == 44) {
			if (extension[2] | (extension[3] & 0xf8))
				return extension[0] == IPPROTO_TCP ? UNREADABLE : NOT_TCP;
			offset += 8;
		} else {
			offset += (extension[1] + 1) * 8;
		}
		next = extension[0];
	}
	return UNREADABLE;
}

static __always_inline int is_older(__u64 netns, const struct segment *it)
{
	struct pod_connection key = {
		.netns = netns,
		.local_ip = it->source,
		.remote_ip = it->destination,
		.local_port = it->source_port,
		.remote_port = it->destination_port,
	};
	return bpf_map_lookup_elem(&older, &key) != NULL;
}

/* Is this the answer to a connection that the proxy opened to the application? */
static __always_inline int is_answer(__u64 netns, const struct segment *it)
{
	struct pod_connection key = {
		.netns = netns,
		.local_ip = it->destination,
		.remote_ip = it->source,
		.local_port = it->destination_port,
		.remote_port = it->source_port,
	};
	return bpf_map_lookup_elem(&proxy_connections, &key) != NULL;
}

/* Every packet that a socket of a pod sends, after it has been routed. */
SEC("cgroup_skb/egress")
int fence_out(struct __sk_buff *skb)
{
	__u32 protocol = READ_U32(skb, protocol);
	struct segment it = {};
	struct bpf_sock *sk;
	struct pod *pod;
	enum kind kind;
	__u64 netns;

	/* What is asked first is what most packets are. */
	if (READ_U32(skb, ifindex) == LOOPBACK_IFINDEX)
		return ALLOW;
	netns = bpf_get_netns_cookie(skb);
	pod = bpf_map_lookup_elem(&pods, &netns);
	if (!pod)
		return ALLOW;
	sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (is_proxys(sk))
		return ALLOW;
	kind = protocol == bpf_htons(ETH_P_IP) ? read_ipv4(skb, &it)
	       : protocol == bpf_htons(ETH_P_IPV6) ? read_ipv6(skb, &it)
	                                                : NOT_TCP;
	if (kind == NOT_TCP)
		return ALLOW;
	if (kind == TCP && is_answer(netns, &it)) {
		COUNT(netns, lost_reply);
		return REFUSE;
	}
	if (!(pod->flags & FENCED) || !is_fenced(&it.destination, ENROLLED))
		return ALLOW;
	if (kind == TCP) {
		/* Resets, and what the kernel answers for a connection in TIME-WAIT: no data, from no socket of its own. */
		if (!it.has_payload && (it.is_reset || (!it.is_syn && (!sk || sk->type == SOCK_RAW))))
			return ALLOW;
		if (has_port(netns, it.destination_port, EXCLUDED_OUTBOUND) ||
		    has_port(netns, it.source_port, EXCLUDED_INBOUND) || is_older(netns, &it))
			return ALLOW;
	}
	COUNT(netns, fence_out);
	return REFUSE;
}

char LICENSE[] SEC("license") = "GPL";
