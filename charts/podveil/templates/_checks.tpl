{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- /* What the schema cannot say: values that do not go together. */ -}}

{{- /* A duration in milliseconds. */ -}}
{{- define "podveil.milliseconds" -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units (regexFind "[a-z]+$" .)) -}}
{{- end }}

{{- define "podveil.check" -}}
{{- $leaf := include "podveil.milliseconds" .Values.ca.leafTtl | int64 -}}
{{- $issuing := include "podveil.milliseconds" .Values.ca.issuingTtl | int64 -}}
{{- $root := include "podveil.milliseconds" .Values.ca.rootTtl | int64 -}}
{{- $release := include "podveil.milliseconds" .Values.node.redirect.releaseBound | int64 -}}
{{- $uninstall := include "podveil.milliseconds" .Values.uninstall.timeout | int64 -}}
{{- if lt $leaf 60000 }}
  {{- fail (printf "ca.leafTtl is %s: certificates of less than a minute are refused by every clock that is a little off" .Values.ca.leafTtl) }}
{{- end }}
{{- if gt (mul 3 $leaf) $issuing }}
  {{- fail (printf "ca.leafTtl is %s, which is more than a third of ca.issuingTtl (%s): an issuing authority is replaced when a third of its life is left, and must outlive what it has issued" .Values.ca.leafTtl .Values.ca.issuingTtl) }}
{{- end }}
{{- if gt $issuing $root }}
  {{- fail (printf "ca.issuingTtl is %s, which is more than ca.rootTtl (%s): no issuing authority outlives its root" .Values.ca.issuingTtl .Values.ca.rootTtl) }}
{{- end }}
{{- if ge $release $uninstall }}
  {{- fail (printf "node.redirect.releaseBound is %s, which is not below uninstall.timeout (%s): an uninstall that waits for the last connection would give up before it" .Values.node.redirect.releaseBound .Values.uninstall.timeout) }}
{{- end }}
{{- end }}
