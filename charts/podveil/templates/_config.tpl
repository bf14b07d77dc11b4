{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- /* The programs' configuration files. Every key is one of docs/configuration.md; what is not here keeps its default. */ -}}

{{- define "podveil.config.node" -}}
trust_domain: {{ .Values.trustDomain | quote }}
xds_address: {{ include "podveil.address" (list . "podveil-controller" 15010) }}
reports_address: {{ include "podveil.address" (list . "podveil-controller-replicas" 15010) }}
ca_address: {{ include "podveil.address" (list . "podveil-ca" 15012) }}
token: /var/run/secrets/podveil/token
bootstrap_bundle: /etc/podveil/bundle.pem
zds_socket: /run/podveil/zds/zds.sock
listeners_socket: /run/podveil/listeners/listeners.sock
take_over: {{ .Values.node.surge }}
log: {{ .Values.log.format }}
{{- end }}

{{- define "podveil.config.node-proxy" -}}
modules: [proxy]
{{ include "podveil.config.node" . }}
state_dir: /var/lib/podveil/proxy
admin_address: 127.0.0.1:15000
metrics_address: "[::]:15020"
{{- if .Values.node.surge }}
readiness_socket: /run/podveil-instance/proxy.sock
{{- else }}
readiness_address: "[::]:15021"
{{- end }}
{{- with .Values.node.proxy.workerThreads }}
worker_threads: {{ . }}
{{- end }}
proxy:
  hold_bound: {{ .Values.node.proxy.holdBound }}
  max_connections_per_pod: {{ .Values.node.proxy.maxConnectionsPerPod | int64 }}
  on_demand: {{ .Values.node.proxy.onDemand }}
  forget_after: {{ .Values.node.proxy.forgetAfter }}
  {{- /* What is left of the grace period is for ending itself. */}}
  drain_bound: {{ sub .Values.node.terminationGracePeriodSeconds 5 }}s
{{- end }}

{{- define "podveil.config.node-redirect" -}}
modules: [redirect]
{{ include "podveil.config.node" . }}
state_dir: /var/lib/podveil/redirect
admin_address: 127.0.0.1:15002
metrics_address: "[::]:15022"
{{- if .Values.node.surge }}
readiness_socket: /run/podveil-instance/redirect.sock
{{- else }}
readiness_address: "[::]:15023"
{{- end }}
redirect:
  hold_bound: {{ .Values.node.redirect.holdBound }}
  release_bound: {{ .Values.node.redirect.releaseBound }}
  {{- /* After the proxy, whose last connections need it. */}}
  drain_bound: {{ sub .Values.node.terminationGracePeriodSeconds 3 }}s
  back_end: {{ .Values.node.redirect.backEnd }}
  bpf_dir: /sys/fs/bpf/podveil
  cni: {{ .Values.node.cni.enabled }}
  cni_fail_closed: {{ .Values.node.cni.failClosed }}
  cni_exempt_namespaces: {{ append .Values.node.cni.exemptNamespaces .Release.Namespace | uniq | toJson }}
  {{- with .Values.node.redirect.criSocket }}
  cri_socket: {{ . }}
  {{- end }}
{{- end }}

{{- define "podveil.config.controller" -}}
trust_domain: {{ .Values.trustDomain | quote }}
source: kubernetes
ca_address: {{ include "podveil.address" (list . "podveil-ca" 15012) }}
token: /var/run/secrets/podveil/token
bootstrap_bundle: /etc/podveil/bundle.pem
state_dir: /var/lib/podveil
{{ include "podveil.config.defaults" . }}
take_over: {{ .Values.enrolment.takeOver }}
log: {{ .Values.log.format }}
{{- end }}

{{- /* The controller says who is enrolled, and the CA by itself who may have an identity: by the same rules. */ -}}
{{- define "podveil.config.defaults" -}}
defaults:
  mode: {{ .Values.enrolment.defaultMode }}
  pod_opt_out: {{ .Values.enrolment.podOptOut }}
{{- end }}

{{- define "podveil.config.ca" -}}
trust_domain: {{ .Values.trustDomain | quote }}
source: kubernetes
{{ include "podveil.config.defaults" . }}
leaf_ttl: {{ .Values.ca.leafTtl }}
program_ttl: {{ .Values.ca.leafTtl }}
issuing_ttl: {{ .Values.ca.issuingTtl }}
root_ttl: {{ .Values.ca.rootTtl }}
rotation:
  timeout: {{ .Values.ca.rotation.timeout }}
  absent_after: {{ .Values.ca.rotation.absentAfter }}
log: {{ .Values.log.format }}
{{- end }}
