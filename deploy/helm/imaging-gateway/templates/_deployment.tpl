{{- /* One role of the gateway: .role, .values of that role, .root. */ -}}
{{- define "gateway.deployment" -}}
{{- $api := eq .role "api" -}}
{{- $role := .role -}}
{{- $values := .values -}}
{{- with .root -}}
{{- /* A worker serves no operators. */ -}}
{{- $secrets := .Values.secrets -}}
{{- $noAdminToken := and .Values.settings.operators (not .Values.secrets.adminToken.existingSecret) -}}
{{- if or (not $api) $noAdminToken }}{{ $secrets = omit $secrets "adminToken" }}{{ end -}}
{{- if not .Values.secrets.metricsToken.existingSecret }}{{ $secrets = omit $secrets "metricsToken" }}{{ end -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "gateway.fullname" . }}-{{ $role }}
  labels:
    {{- include "gateway.labels" . | nindent 4 }}
    app.kubernetes.io/component: {{ $role }}
spec:
  {{- if not $values.autoscaling.enabled }}
  replicas: {{ $values.replicas }}
  {{- end }}
  revisionHistoryLimit: 3
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
  selector:
    matchLabels:
      {{- include "gateway.selector" . | nindent 6 }}
      app.kubernetes.io/component: {{ $role }}
  template:
    metadata:
      labels:
        {{- with $values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- include "gateway.selector" . | nindent 8 }}
        app.kubernetes.io/component: {{ $role }}
        app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
      annotations:
        kubectl.kubernetes.io/default-container: gateway
        {{- with $values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ include "gateway.serviceAccount" . }}
      automountServiceAccountToken: false
      # For a Service named gateway, Kubernetes would set GATEWAY_SERVICE_HOST, which is an unknown setting.
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ include "gateway.graceSeconds" . }}
      securityContext:
        {{- include "gateway.podSecurityContext" . | nindent 8 }}
      {{- with .Values.image.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      {{- with $values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with $values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints:
        {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
        - topologyKey: {{ . }}
          maxSkew: 1
          whenUnsatisfiable: ScheduleAnyway
          # Only pods of one version: pods of the previous one would distort the spread during a rollout.
          matchLabelKeys: [pod-template-hash]
          labelSelector:
            matchLabels:
              {{- include "gateway.selector" $.root | nindent 14 }}
              app.kubernetes.io/component: {{ $role }}
        {{- end }}
      containers:
        - name: gateway
          image: {{ include "gateway.image" . }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          args: [serve]
          env:
            - name: GATEWAY_ENV
              value: production
            - name: GATEWAY_ROLE
              value: {{ $role }}
            - name: GATEWAY_PORT
              value: "8080"
            - name: GATEWAY_OPS_HOST
              value: {{ .Values.settings.host | quote }}
            - name: GATEWAY_OPS_PORT
              value: "8081"
            {{- $_ := required "settings.upstreamUrl must be the base address of the upstream" .Values.settings.upstreamUrl }}
            {{- range $name, $value := .Values.settings }}
            - name: GATEWAY_{{ snakecase $name | upper }}
              value: {{ include "gateway.setting" $value | quote }}
            {{- end }}
            {{- range $name, $_ := $secrets }}
            - name: GATEWAY_{{ snakecase $name | upper }}_FILE
              value: {{ include "gateway.secretFolder" $ }}/{{ kebabcase $name }}
            {{- end }}
            {{- with .Values.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            {{- if $api }}
            - name: tenants
              containerPort: 8080
            {{- end }}
            - name: operators
              containerPort: 8081
          # Every role has the operators' port. It is the last to close, and no probe waits there behind tenants.
          startupProbe:
            httpGet: {path: /healthz, port: operators}
            periodSeconds: 2
            failureThreshold: 30
          livenessProbe:
            httpGet: {path: /healthz, port: operators}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 3
          readinessProbe:
            httpGet: {path: /readyz, port: operators}
            periodSeconds: 5
            timeoutSeconds: 3
            failureThreshold: 2
          {{- if and $api .Values.preStopSeconds }}
          lifecycle:
            preStop:
              sleep: {seconds: {{ .Values.preStopSeconds }}}
          {{- end }}
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          securityContext:
            {{- include "gateway.securityContext" . | nindent 12 }}
          volumeMounts:
            - name: secrets
              mountPath: {{ include "gateway.secretFolder" . }}
              readOnly: true
            - name: scratch
              mountPath: /tmp
            {{- with .Values.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: secrets
          projected:
            defaultMode: 0440
            sources:
              {{- range $name, $secret := $secrets }}
              {{- include "gateway.secretSource" (dict "name" $name "secret" $secret) | nindent 14 }}
              {{- end }}
        # For libraries that need one. The gateway itself keeps uploads in memory.
        - name: scratch
          emptyDir: {sizeLimit: 64Mi}
        {{- with .Values.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end }}
{{- end }}
