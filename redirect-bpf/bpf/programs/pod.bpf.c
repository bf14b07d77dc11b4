// SPDX-License-Identifier: Apache-2.0
/* The programs that each pod has for itself: in its network namespace, asked for the socket of every SYN that comes to
 * one of its own addresses or was routed over `lo`. */
#include "maps.h"

/* Cookie of the namespace that this copy is attached to; the kernel does not tell it here. */
const volatile __u64 NETNS = 0;

struct ends {
	struct ip local;
	struct ip remote;
	__u16 local_port;
	__u16 remote_port;
};

static __always_inline struct ends ends_of(struct bpf_sk_lookup *ctx)
{
	struct ends it;

	if (READ_U32(ctx, family) == AF_INET) {
		it.local = ipv4(READ_U32(ctx, local_ip4));
		it.remote = ipv4(READ_U32(ctx, remote_ip4));
	} else {
		it.local.word[0] = READ_U32(ctx, local_ip6[0]);
		it.local.word[1] = READ_U32(ctx, local_ip6[1]);
		it.local.word[2] = READ_U32(ctx, local_ip6[2]);
		it.local.word[3] = READ_U32(ctx, local_ip6[3]);
		it.remote.word[0] = READ_U32(ctx, remote_ip6[0]);
		it.remote.word[1] = READ_U32(ctx, remote_ip6[1]);
		it.remote.word[2] = READ_U32(ctx, remote_ip6[2]);
		it.remote.word[3] = READ_U32(ctx, remote_ip6[3]);
	}
	it.local_port = READ_U32(ctx, local_port);
	it.remote_port = bpf_ntohs(READ_U16(ctx, remote_port));
	return it;
}

/* The proxy's own connection to the application, from whatever address. */
static __always_inline int is_from_proxy(__u64 netns, const struct ends *it)
{
	struct pod_connection key = {
		.netns = netns,
		.local_ip = it->remote,
		.remote_ip = it->local,
		.local_port = it->remote_port,
		.remote_port = it->local_port,
	};
	return bpf_map_lookup_elem(&proxy_connections, &key) != NULL;
}

/* From outside, to a port that capture looks at. */
static __always_inline int is_plain(__u64 netns, const struct ends *it)
{
	return it->local_port != HBONE_PORT && !has_port(netns, it->local_port, EXCLUDED_INBOUND) &&
	       !is_from_proxy(netns, it);
}

static __always_inline int is_refused(__u64 netns, __u32 flags, const struct ends *it)
{
	return flags & FENCED && flags & REFUSES_PLAIN && is_fenced(&it->remote, MANDATORY) &&
	       !has_port(netns, it->local_port, PLAIN_INBOUND);
}

/* The verifier wants to see that nothing else is answered, and loses sight of a value that the compiler puts aside. */
static __always_inline int verdict(int value)
{
	asm volatile("" : "+r"(value));
	return value & SK_PASS;
}

static __always_inline int pick(struct bpf_sk_lookup *ctx)
{
	__u64 netns = NETNS;
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct pod_listener key = {.netns = netns};
	struct bpf_sock *listener;
	struct ends it;
	long failed;

	if (!pod || !(pod->flags & CAPTURING) || READ_U32(ctx, protocol) != IPPROTO_TCP)
		return SK_PASS;
	it = ends_of(ctx);
	if (is_own_address(netns, &it.remote)) {
		if (is_own_address(netns, &it.local))
			return SK_PASS;
		key.port = OUTBOUND_PORT;
	} else {
		if (!is_plain(netns, &it))
			return SK_PASS;
		/* The fence has counted it. */
		if (is_refused(netns, pod->flags, &it))
			return SK_DROP;
		key.port = INBOUND_PORT;
	}
	key.is_ipv6 = READ_U32(ctx, family) == AF_INET6;
	listener = bpf_map_lookup_elem(&listeners, &key);
	if (!listener) {
		COUNT(netns, no_listener);
		return SK_DROP;
	}
	failed = bpf_sk_assign(ctx, listener, 0);
	bpf_sk_release(listener);
	return failed ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int capture(struct bpf_sk_lookup *ctx)
{
	return verdict(pick(ctx));
}

/* A link of its own: it stands when capture is gone. */
SEC("sk_lookup")
int fence_in(struct bpf_sk_lookup *ctx)
{
	__u64 netns = NETNS;
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct ends it;

	if (!pod || !(pod->flags & REFUSES_PLAIN) || READ_U32(ctx, protocol) != IPPROTO_TCP)
		return SK_PASS;
	it = ends_of(ctx);
	if (is_own_address(netns, &it.remote) || !is_plain(netns, &it) || !is_refused(netns, pod->flags, &it))
		return SK_PASS;
	COUNT(netns, fence_in);
	return SK_DROP;
}

char LICENSE[] SEC("license") = "GPL";
