{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}

{{- define "podveil.labels" -}}
app.kubernetes.io/name: podveil
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Labels of one program; the first is what selectors ask for. Call: (list . "ca"). */ -}}
{{- define "podveil.selector" -}}
app.kubernetes.io/component: podveil-{{ index . 1 }}
{{- end }}

{{- define "podveil.componentLabels" -}}
{{ include "podveil.selector" . }}
{{ include "podveil.labels" (index . 0) }}
{{- end }}

{{- /* Call: (list . "ca"). */ -}}
{{- define "podveil.image" -}}
{{- $ := index . 0 -}}
image: {{ printf "%s/%s:%s" $.Values.image.prefix (index . 1) ($.Values.image.tag | default $.Chart.AppVersion) | quote }}
imagePullPolicy: {{ $.Values.image.pullPolicy }}
{{- end }}

{{- define "podveil.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* A pod is made again when what it reads at its start has changed. */ -}}
{{- define "podveil.podAnnotations" -}}
podveil.io/config-hash: {{ index . 1 | sha256sum | trunc 16 }}
{{- end }}

{{- define "podveil.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "podveil.restrictedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* The configuration of the programs, and the roots. Until the CA has published these, at the first installation, the
kubelet does not start the pod and tries again within seconds; into a pod that runs, it would bring them in a minute. */ -}}
{{- define "podveil.configVolume" -}}
- name: config
  projected:
    sources:
      - configMap:
          name: podveil-config
          items:
            {{- range (index . 1) }}
            - { key: {{ . }}.yaml, path: {{ . }}.yaml }
            {{- end }}
      - configMap:
          name: podveil-roots
          items:
            - { key: bundle.pem, path: bundle.pem }
{{- end }}

{{- /* Proves to the CA who this is, at first contact only. */ -}}
{{- define "podveil.tokenVolume" -}}
- name: token
  projected:
    sources:
      - serviceAccountToken:
          audience: podveil-ca
          expirationSeconds: 3600
          path: token
{{- end }}

{{- /* Replicas on different nodes and zones, where there are enough. Call: (list . "ca"). */ -}}
{{- define "podveil.spread" -}}
topologySpreadConstraints:
  {{- range (list "kubernetes.io/hostname" "topology.kubernetes.io/zone") }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "podveil.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "podveil.priority" -}}
{{- $ := index . 0 -}}
{{- if $.Values.priorityClasses.create }}
priorityClassName: podveil-{{ index . 1 }}
{{- end }}
{{- end }}

{{- /* The environment that every program gets. */ -}}
{{- define "podveil.env" -}}
- { name: RUST_LOG, value: {{ .Values.log.level | quote }} }
- name: POD_NAME
  valueFrom: { fieldRef: { fieldPath: metadata.name } }
- name: POD_NAMESPACE
  valueFrom: { fieldRef: { fieldPath: metadata.namespace } }
{{- end }}

{{- /* And what each program of a node gets too; a variable may name those before it. */ -}}
{{- define "podveil.nodeEnv" -}}
{{ include "podveil.env" . }}
- name: NODE_NAME
  valueFrom: { fieldRef: { fieldPath: spec.nodeName } }
{{- with .Values.node.cgroup }}
- { name: PODVEIL_CGROUP, value: {{ . | quote }} }
{{- end }}
{{- end }}

{{- /* host:port of one of our services. Call: (list . "podveil-ca" 15012). */ -}}
{{- define "podveil.address" -}}
{{ index . 1 }}.{{ (index . 0).Release.Namespace }}.svc:{{ index . 2 }}
{{- end }}

{{- /* Of one module of the node program. With a surge two of them share the node's ports, so each is asked for itself. */ -}}
{{- define "podveil.nodeProbe" -}}
{{- $root := index . 0 -}}
{{- $module := index . 1 -}}
{{- if $root.Values.node.surge -}}
exec: { command: [/usr/bin/podveil-node, ready, /run/podveil-instance/{{ $module }}.sock] }
timeoutSeconds: 5
{{- else -}}
httpGet: { path: /healthz/ready, port: {{ index . 2 }} }
{{- end }}
periodSeconds: 2
{{- end }}
