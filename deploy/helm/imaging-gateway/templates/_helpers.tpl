{{- /* Short enough for all that is put behind it. */ -}}
{{- define "gateway.fullname" -}}
{{- $name := .Values.fullnameOverride | default (contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name)) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- /* What selects pods. `app.kubernetes.io/name` is also the job by which the rules of Prometheus know the gateway. */ -}}
{{- define "gateway.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "gateway.labels" -}}
{{ include "gateway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "gateway.image" -}}
{{- $repository := required "image.repository must say where the image is, as in registry/imaging-gateway" .Values.image.repository -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ $repository }}@{{ .digest }}
{{- else -}}
{{ $repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "gateway.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "gateway.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end }}

{{- /* A setting as its variable has it. Helm reads numbers as floats, which would print as 2.5e+07. */ -}}
{{- define "gateway.setting" -}}
{{- if kindIs "map" . -}}
{{- $pairs := list -}}
{{- range $name, $word := . }}{{ $pairs = append $pairs (printf "%s=%s" $name $word) }}{{ end -}}
{{ join "," $pairs }}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{ int64 . }}
{{- else -}}
{{ . }}
{{- end -}}
{{- end }}

{{- /* At the termination of a pod, submissions may take one lease to get a response, and one more to be stored. Usually it
is much less. */ -}}
{{- define "gateway.graceSeconds" -}}
{{ add .Values.preStopSeconds (mul 2 .Values.settings.leaseSeconds) 15 }}
{{- end }}

{{- define "gateway.secretFolder" -}}/run/secrets/gateway{{- end }}

{{- /* One secret as a source of a projected volume: .name of the value, .secret. */ -}}
{{- define "gateway.secretSource" -}}
- secret:
    name: {{ required (printf "secrets.%s.existingSecret must name the Secret that holds it" .name) .secret.existingSecret }}
    items: [{key: {{ .secret.key }}, path: {{ kebabcase .name }}}]
{{- end }}

{{- define "gateway.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "gateway.securityContext" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}

{{- /* The pods of the Job. Another name than the gateway's, so that no Service and no rule takes them for it. */ -}}
{{- define "gateway.registrySelector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-registry
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* One rule of egress: .to (all, if empty), .ports, .udp as well as TCP. */ -}}
{{- define "gateway.egress" -}}
{{- $udp := .udp -}}
- ports:
    {{- range .ports }}
    - {port: {{ int . }}, protocol: TCP}
    {{- if $udp }}
    - {port: {{ int . }}, protocol: UDP}
    {{- end }}
    {{- end }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- /* Checks that the schema can't express, or not with a clear message. */ -}}
{{- define "gateway.checked" -}}
{{- range .Values.extraEnv }}
{{- if hasPrefix "GATEWAY_" .name }}
{{- fail (printf "extraEnv must not have %s: use settings and secrets for the gateway's own variables" .name) }}
{{- end }}
{{- end }}
{{- range .Values.registry.secretEnv }}
{{- if hasPrefix "GATEWAY_" .name }}
{{- fail (printf "registry.secretEnv must not have %s: it is a variable of the gateway itself" .name) }}
{{- end }}
{{- end }}
{{- range $role := list "api" "worker" }}
{{- range $label, $_ := (index $.Values $role).podLabels }}
{{- if hasPrefix "app.kubernetes.io/" $label }}
{{- fail (printf "%s.podLabels must not have %s: the chart selects pods by it" $role $label) }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.networkPolicy }}
{{- /* For pods in the cluster a policy applies to the port behind their Service, which a URL does not contain. */}}
{{- if and .enabled .upstream.to (not (contains "Selector" (toJson .upstream.to))) (not .extraEgress) $.Values.settings.upstreamUrl }}
{{- $url := urlParse $.Values.settings.upstreamUrl }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (eq $url.scheme "http" | ternary "80" "443") }}
{{- $open := list }}
{{- range .upstream.ports }}{{ $open = append $open (int . | toString) }}{{ end }}
{{- if not (has $port $open) }}
{{- fail (printf "networkPolicy.upstream.ports must have %s, the port of settings.upstreamUrl, or no pod can reach it" $port) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
