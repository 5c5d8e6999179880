{{/* The chart's name. */}}
{{- define "equipot.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* What everything is called; short enough for what is appended. */}}
{{- define "equipot.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "equipot.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "equipot.selectorLabels" -}}
app.kubernetes.io/name: {{ include "equipot.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The pods that answer calls: all, the leaders of groups, or those that Ray finds well. */}}
{{- define "equipot.servingLabels" -}}
{{ include "equipot.selectorLabels" . }}
app.kubernetes.io/component: server
{{- if eq .Values.mode "leaderWorkerSet" }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- else if eq .Values.mode "rayService" }}
ray.io/serve: "true"
{{- end }}
{{- end -}}

{{- define "equipot.labels" -}}
{{ include "equipot.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* metadata of an object. Called with a list: the context, the name's suffix, further annotations, further labels. */}}
{{- define "equipot.metadata" -}}
{{- $context := index . 0 -}}
{{- $annotations := merge (dict) (index . 2) $context.Values.commonAnnotations -}}
name: {{ include "equipot.fullname" $context }}{{ index . 1 }}
namespace: {{ $context.Release.Namespace }}
labels:
  {{- include "equipot.labels" $context | nindent 2 }}
  {{- if gt (len .) 3 }}
  {{- with index . 3 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "equipot.image" -}}
{{- $image := .Values.image -}}
{{- $name := $image.repository -}}
{{- if $image.registry -}}{{- $name = printf "%s/%s" $image.registry $image.repository -}}{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name ($image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "equipot.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "equipot.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* What a replica's pods are called in the API. */}}
{{- define "equipot.workload" -}}
{{- if eq .Values.mode "deployment" -}}
apiVersion: apps/v1
kind: Deployment
{{- else -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- end -}}
{{- end -}}

{{/*
Replicas, as JSON: {"count": N or null, "mark": what the next upgrade must know}.

A count that was once in a manifest must stay there: both Helms would have the API fall back to 1 if it were left
out. A count that never was is left to the cluster, which no upgrade, rollback or GitOps controller then touches.
  replicaCount null (or an autoscaler), fresh or left out before:  left out
  replicaCount null (or an autoscaler), in the manifest before:    the live count
  replicaCount N, as in the last release:                          the live count
  replicaCount N, fresh or changed:                                N
Where jobs are kept, the live count is no more than 1: a second server could not have their folder.
*/}}
{{- define "equipot.replicas" -}}
{{- $wanted := "" -}}
{{- if and (not (kindIs "invalid" .Values.replicaCount)) (eq .Values.autoscaling.kind "none") -}}
{{- $wanted = toString (int .Values.replicaCount) -}}
{{- end -}}
{{- $workload := include "equipot.workload" . | fromYaml -}}
{{- $live := lookup $workload.apiVersion $workload.kind .Release.Namespace (include "equipot.fullname" .) -}}
{{- if $live -}}
{{- $mark := dig "metadata" "annotations" "equipot/replica-count" "" $live -}}
{{- $count := int (dig "spec" "replicas" 1 $live) -}}
{{- if .Values.jobs.enabled }}{{ $count = min 1 $count | int }}{{ end -}}
{{- if $wanted -}}
{{- dict "count" (ternary $count (int $wanted) (eq $mark $wanted)) "mark" $wanted | toJson -}}
{{- else if eq $mark "left to the cluster" -}}
{{- dict "count" nil "mark" $mark | toJson -}}
{{- else -}}
{{- dict "count" $count "mark" "kept" | toJson -}}
{{- end -}}
{{- else if $wanted -}}
{{- dict "count" (int $wanted) "mark" $wanted | toJson -}}
{{- else -}}
{{- dict "count" nil "mark" "left to the cluster" | toJson -}}
{{- end -}}
{{- end -}}

{{/* Most replicas there may be, as far as the values say; 2 if the cluster decides. */}}
{{- define "equipot.mostReplicas" -}}
{{- if ne .Values.autoscaling.kind "none" -}}
{{- .Values.autoscaling.maxReplicas -}}
{{- else if kindIs "invalid" .Values.replicaCount -}}
2
{{- else -}}
{{- .Values.replicaCount -}}
{{- end -}}
{{- end -}}

{{/* Ranks in one pod. */}}
{{- define "equipot.ranksPerPod" -}}
{{- if eq .Values.mode "leaderWorkerSet" -}}
{{- div (int .Values.server.tensorParallel) (int .Values.leaderWorkerSet.size) -}}
{{- else -}}
{{- .Values.server.tensorParallel -}}
{{- end -}}
{{- end -}}

{{- define "equipot.usesVolume" -}}
{{- if ne .Values.storage.kind "none" }}yes{{- end -}}
{{- end -}}

{{- define "equipot.fetches" -}}
{{- range .Values.models }}{{ if .url }}yes{{ end }}{{ end -}}
{{- end -}}

{{/* Folder of a model, called with the model. */}}
{{- define "equipot.modelPath" -}}
{{- if .url -}}
/models/{{ .name }}
{{- else if hasPrefix "/" .path -}}
{{ .path }}
{{- else -}}
/models/{{ .path }}
{{- end -}}
{{- end -}}

{{/* Seconds from the wish that a pod ends until it is killed. */}}
{{- define "equipot.graceSeconds" -}}
{{- $end := .Values.termination -}}
{{- add (int $end.endpointSeconds) (int $end.lingerSeconds) (int $end.drainSeconds) (int $end.marginSeconds) -}}
{{- end -}}

{{- define "equipot.startupFailures" -}}
{{- div (add (int .Values.startup.budgetSeconds) (sub (int .Values.startup.periodSeconds) 1)) (int .Values.startup.periodSeconds) -}}
{{- end -}}

{{/* How long an update of this many pods may take, in minutes, for --timeout. */}}
{{- define "equipot.timeoutMinutes" -}}
{{- $pods := max 1 (int (include "equipot.mostReplicas" .)) -}}
{{- $each := add (int .Values.startup.budgetSeconds) (int (include "equipot.graceSeconds" .)) -}}
{{- div (add (mul $pods $each) 59) 60 -}}
{{- end -}}

{{/* Words for `equipot serve`, one a line, as YAML. */}}
{{- define "equipot.serveArgs" -}}
{{- $server := .Values.server -}}
- serve
{{- if .Values.repository.url }}
- --repository
- {{ .Values.repository.url | quote }}
- --repository-poll
- {{ .Values.repository.pollSeconds | quote }}
{{- end }}
{{- range .Values.models }}
- {{ include "equipot.modelPath" . | quote }}
{{- end }}
- --host=0.0.0.0
- --port=50051
- --metrics-port=9090
- --device={{ $server.device }}
- --tensor-parallel={{ $server.tensorParallel }}
{{- if eq .Values.mode "leaderWorkerSet" }}
- --worker-hosts={{ sub (int .Values.leaderWorkerSet.size) 1 }}
- --worker-port=50052
- --worker-key=/etc/equipot/worker-key/key
{{- end }}
{{- range $flag, $value := dict "dtype" $server.dtype "threads" $server.threads "max-atoms" $server.maxAtoms "max-edges" $server.maxEdges "max-batch-edges" $server.maxBatchEdges "max-queue-edges" $server.maxQueueEdges "max-message-mb" $server.maxMessageMb }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}
- --{{ $flag }}={{ ternary (toString $value) (toString (int64 $value)) (kindIs "string" $value) }}
{{- end }}
{{- end }}
{{- if $server.deterministic }}
- --deterministic
{{- end }}
- --max-connection-age={{ $server.maxConnectionAge }}
- --log-format={{ $server.logFormat }}
{{- if not $server.reflection }}
- --no-reflection
{{- end }}
- --{{ ternary "ui" "no-ui" $server.ui }}
{{- if .Values.jobs.enabled }}
- --config=/etc/equipot/jobs/jobs.toml
{{- end }}
- --linger-seconds={{ .Values.termination.lingerSeconds }}
- --drain-seconds={{ .Values.termination.drainSeconds }}
{{- if .Values.tls.enabled }}
- --tls-cert=/etc/equipot/tls/tls.crt
- --tls-key=/etc/equipot/tls/tls.key
{{- if .Values.tls.mutual }}
- --tls-client-ca=/etc/equipot/{{ ternary "client-ca" "tls" (ne .Values.tls.clientCaSecret "") }}/ca.crt
{{- end }}
{{- end }}
{{- if .Values.auth.tokensSecret }}
- --tokens=/etc/equipot/tokens/{{ .Values.auth.tokensKey }}
{{- if not .Values.tls.enabled }}
- --allow-plaintext-tokens
{{- end }}
{{- end }}
{{- if .Values.auth.identityLimits }}
- --identity-limits=/etc/equipot/limits/limits.toml
{{- end }}
{{- range $server.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* How a probe asks; kubelet's own gRPC probe speaks no TLS. Called with context and service. */}}
{{- define "equipot.ask" -}}
{{- $context := index . 0 -}}
{{- if $context.Values.tls.enabled -}}
exec:
  command:
    - equipot
    - probe
    - localhost:50051
    - --service={{ index . 1 }}
    - --timeout={{ $context.Values.probes.timeoutSeconds }}
    {{- include "equipot.tlsOfCaller" $context | nindent 4 }}
{{- else -}}
grpc:
  port: 50051
  service: {{ index . 1 }}
{{- end -}}
{{- end -}}

{{/* Words for `equipot probe` against our own certificate, which is also shown where one is asked for. */}}
{{- define "equipot.tlsOfCaller" -}}
- --tls-ca=/etc/equipot/tls/ca.crt
- --tls-name={{ include "equipot.fullname" . }}.{{ .Release.Namespace }}.svc
{{- if .Values.tls.mutual }}
- --tls-cert=/etc/equipot/tls/tls.crt
- --tls-key=/etc/equipot/tls/tls.key
{{- end }}
{{- end -}}

{{- define "equipot.probes" -}}
{{- $timeout := .Values.probes.timeoutSeconds -}}
{{- if .Values.tls.enabled }}{{ $timeout = add (int $timeout) 5 }}{{ end -}}
startupProbe:
  {{- include "equipot.ask" (list . "equipot.readiness") | nindent 2 }}
  periodSeconds: {{ .Values.startup.periodSeconds }}
  failureThreshold: {{ include "equipot.startupFailures" . }}
  timeoutSeconds: {{ $timeout }}
livenessProbe:
  {{- include "equipot.ask" (list . "equipot.liveness") | nindent 2 }}
  periodSeconds: {{ .Values.probes.livenessPeriodSeconds }}
  failureThreshold: {{ .Values.probes.livenessFailureThreshold }}
  timeoutSeconds: {{ $timeout }}
readinessProbe:
  {{- include "equipot.ask" (list . "equipot.readiness") | nindent 2 }}
  periodSeconds: {{ .Values.probes.readinessPeriodSeconds }}
  failureThreshold: {{ .Values.probes.readinessFailureThreshold }}
  timeoutSeconds: {{ $timeout }}
{{- end -}}

{{- define "equipot.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if eq .Values.server.device "cuda" -}}
{{- $gpus := dict .Values.gpu.resource (int (include "equipot.ranksPerPod" .)) -}}
{{- $resources = mergeOverwrite (dict "limits" (dict)) $resources (dict "limits" $gpus) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "equipot.env" -}}
- {name: HOME, value: /cache}
- {name: TORCH_EXTENSIONS_DIR, value: /cache/kernels}
- {name: TMPDIR, value: /tmp}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "equipot.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
- {name: shm, mountPath: /dev/shm}
{{- if include "equipot.usesVolume" . }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- include "equipot.secretMounts" . }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "equipot.secretMounts" }}
{{- if eq .Values.mode "leaderWorkerSet" }}
- {name: worker-key, mountPath: /etc/equipot/worker-key, readOnly: true}
{{- end }}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/equipot/tls, readOnly: true}
{{- if .Values.tls.clientCaSecret }}
- {name: client-ca, mountPath: /etc/equipot/client-ca, readOnly: true}
{{- end }}
{{- end }}
{{- if .Values.auth.tokensSecret }}
- {name: tokens, mountPath: /etc/equipot/tokens, readOnly: true}
{{- end }}
{{- if .Values.auth.identityLimits }}
- {name: limits, mountPath: /etc/equipot/limits, readOnly: true}
{{- end }}
{{- end }}

{{- define "equipot.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "equipot.fullname" .)) -}}
{{- end -}}

{{/* How metrics are read where the page makes their port HTTPS. */}}
{{- define "equipot.scrapeTls" -}}
{{- if and .Values.server.ui .Values.tls.enabled -}}
scheme: https
tlsConfig:
  ca:
    secret: {name: {{ include "equipot.tlsSecret" . }}, key: ca.crt}
  serverName: {{ include "equipot.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end -}}
{{- end -}}

{{- define "equipot.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: cache
  {{- if .Values.cacheClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.cacheClaim }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.cacheSize }}}
  {{- end }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.shmSize }}}
{{- if eq .Values.mode "leaderWorkerSet" }}
- name: worker-key
  secret: {secretName: {{ .Values.leaderWorkerSet.keySecret }}, defaultMode: 0440}
{{- end }}
{{- if eq .Values.storage.kind "emptyDir" }}
- name: models
  emptyDir: {sizeLimit: {{ .Values.storage.size }}}
{{- else if include "equipot.usesVolume" . }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.storage.existingClaim | default (printf "%s-models" (include "equipot.fullname" .)) }}
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "equipot.tlsSecret" . }}, defaultMode: 0440}
{{- with .Values.tls.clientCaSecret }}
- name: client-ca
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- with .Values.auth.tokensSecret }}
- name: tokens
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if .Values.auth.identityLimits }}
- name: limits
  configMap: {name: {{ include "equipot.fullname" . }}-limits}
{{- end }}
{{- if and .Values.fetch.tokenSecret (include "equipot.fetches" .) }}
- name: fetch-token
  secret: {secretName: {{ .Values.fetch.tokenSecret }}, defaultMode: 0440}
{{- end }}
{{- if and .Values.fetch.registrySecret (include "equipot.fetches" .) }}
- name: fetch-registry
  secret:
    secretName: {{ .Values.fetch.registrySecret }}
    defaultMode: 0440
    items: [{key: .dockerconfigjson, path: config.json}]
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Containers that bring the models, one a model. */}}
{{- define "equipot.initContainers" -}}
{{- $context := . -}}
{{- with .Values.extraInitContainers }}
{{ tpl (toYaml .) $context }}
{{- end }}
{{- range $place, $model := .Values.models }}
{{- if $model.url }}
- name: fetch-{{ $place }}
  image: {{ include "equipot.image" $context | quote }}
  imagePullPolicy: {{ $context.Values.image.pullPolicy }}
  args:
    - fetch
    - {{ $model.url | quote }}
    - --sha256={{ $model.sha256 }}
    - --out=/models
    - --name={{ $model.name }}
    {{- if $context.Values.fetch.tokenSecret }}
    - --token-file=/etc/equipot/fetch-token/{{ $context.Values.fetch.tokenKey }}
    {{- end }}
  env:
    - {name: HOME, value: /tmp}
    {{- if $context.Values.fetch.registrySecret }}
    - {name: DOCKER_CONFIG, value: /etc/equipot/fetch-registry}
    {{- end }}
    {{- with $context.Values.fetch.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $context.Values.fetch.envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $context.Values.containerSecurityContext | nindent 4 }}
  resources:
    {{- toYaml $context.Values.fetch.resources | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: models, mountPath: /models}
    {{- if $context.Values.fetch.tokenSecret }}
    - {name: fetch-token, mountPath: /etc/equipot/fetch-token, readOnly: true}
    {{- end }}
    {{- if $context.Values.fetch.registrySecret }}
    - {name: fetch-registry, mountPath: /etc/equipot/fetch-registry, readOnly: true}
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What pods have in common, whatever runs in them. */}}
{{- define "equipot.podCommon" -}}
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- tpl (toYaml .) $ | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "equipot.account" -}}
serviceAccountName: {{ include "equipot.serviceAccountName" . }}
automountServiceAccountToken: {{ .Values.serviceAccount.automountToken }}
{{- end -}}

{{- define "equipot.spread" -}}
topologySpreadConstraints:
{{- if .Values.topologySpreadConstraints }}
  {{- tpl (toYaml .Values.topologySpreadConstraints) . | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "equipot.servingLabels" . | nindent 8 }}
{{- end }}
{{- end -}}

{{/* metadata of pods, called with the context and the component. */}}
{{- define "equipot.podMetadata" -}}
{{- $context := index . 0 -}}
labels:
  {{- /* No versions: a new chart alone must not replace pods. */}}
  {{- include "equipot.selectorLabels" $context | nindent 2 }}
  app.kubernetes.io/component: {{ index . 1 }}
  {{- with merge (dict) $context.Values.podLabels $context.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := deepCopy $context.Values.podAnnotations -}}
{{- if $context.Values.auth.identityLimits -}}
{{- $annotations = set $annotations "equipot/limits" ($context.Values.auth.identityLimits | sha256sum | trunc 16) -}}
{{- end -}}
{{- if and $context.Values.jobs.enabled (eq (index . 1) "server") -}}
{{- $annotations = set $annotations "equipot/jobs" (include "equipot.jobsSettings" $context | sha256sum | trunc 16) -}}
{{- end -}}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The pod that answers calls, and computes, or leads those that compute. */}}
{{- define "equipot.serverPod" -}}
{{ include "equipot.account" . }}
{{ include "equipot.podCommon" . }}
{{ include "equipot.spread" . }}
terminationGracePeriodSeconds: {{ include "equipot.graceSeconds" . }}
{{- with include "equipot.initContainers" . | trim }}
initContainers:
  {{- . | nindent 2 }}
{{- end }}
containers:
  - name: server
    image: {{ include "equipot.image" . | quote }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    args:
      {{- include "equipot.serveArgs" . | nindent 6 }}
    ports:
      - {name: grpc, containerPort: 50051}
      - {name: metrics, containerPort: 9090}
    env:
      {{- include "equipot.env" . | nindent 6 }}
    {{- with .Values.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- include "equipot.probes" . | nindent 4 }}
    lifecycle:
      preStop:
        exec:
          # Proxies learn meanwhile that the pod is gone; then SIGTERM comes, and the server drains by itself.
          command: [sleep, {{ .Values.termination.endpointSeconds | quote }}]
    resources:
      {{- include "equipot.resources" . | nindent 6 }}
    securityContext:
      {{- toYaml .Values.containerSecurityContext | nindent 6 }}
    volumeMounts:
      {{- include "equipot.mounts" . | nindent 6 }}
      {{- if .Values.jobs.enabled }}
      - {name: jobs, mountPath: /jobs}
      - {name: jobs-settings, mountPath: /etc/equipot/jobs, readOnly: true}
      {{- end }}
  {{- with .Values.extraContainers }}
  {{- tpl (toYaml .) $ | nindent 2 }}
  {{- end }}
volumes:
  {{- include "equipot.volumes" . | nindent 2 }}
  {{- if .Values.jobs.enabled }}
  - name: jobs-settings
    configMap: {name: {{ include "equipot.fullname" . }}-jobs}
  - name: jobs
    {{- if eq .Values.jobs.kind "emptyDir" }}
    emptyDir: {sizeLimit: {{ .Values.jobs.sizeGi }}Gi}
    {{- else }}
    persistentVolumeClaim:
      claimName: {{ include "equipot.jobsClaim" . }}
    {{- end }}
  {{- end }}
{{- end -}}

{{/* What Ray Serve runs: our application's builder with the server's configuration as its arguments. */}}
{{- define "equipot.serveConfig" -}}
{{- $server := .Values.server -}}
{{- $args := dict "device" $server.device "tensor_parallel" (int $server.tensorParallel) "deterministic" $server.deterministic -}}
{{- if .Values.repository.url -}}
{{- $_ := set $args "repository" (dict "url" .Values.repository.url "poll" (int .Values.repository.pollSeconds)) -}}
{{- else -}}
{{- $bundles := list -}}
{{- range .Values.models }}{{ $bundles = append $bundles (include "equipot.modelPath" .) }}{{ end -}}
{{- $_ := set $args "bundles" $bundles -}}
{{- end -}}
{{- with $server.dtype }}{{ $_ := set $args "dtype" . }}{{ end -}}
{{- with $server.threads }}{{ $_ := set $args "threads" (int .) }}{{ end -}}
{{- $limits := dict -}}
{{- with $server.maxAtoms }}{{ $_ := set $limits "structure_atoms" (int64 .) }}{{ end -}}
{{- with $server.maxEdges }}{{ $_ := set $limits "structure_edges" (int64 .) }}{{ end -}}
{{- with $server.maxMessageMb }}{{ $_ := set $limits "message_bytes" (mul (int64 .) 1048576) }}{{ end -}}
{{- with $limits }}{{ $_ := set $args "limits" . }}{{ end -}}
{{- $budget := dict -}}
{{- with $server.maxBatchEdges }}{{ $_ := set $budget "batch_edges" (int64 .) }}{{ end -}}
{{- with $server.maxQueueEdges }}{{ $_ := set $budget "queue_edges" (int64 .) }}{{ end -}}
{{- with $budget }}{{ $_ := set $args "budget" . }}{{ end -}}
{{- $_ := set $args "log_format" $server.logFormat -}}
{{- $_ := set $args "reflection" $server.reflection -}}
{{- $_ := set $args "drain_seconds" (int .Values.termination.drainSeconds) -}}
{{- $_ := set $args "metrics_port" false -}}
{{- if .Values.auth.tokensSecret -}}
{{- $_ := set $args "tokens" (printf "/etc/equipot/tokens/%s" .Values.auth.tokensKey) -}}
{{- $_ := set $args "allow_plaintext_tokens" true -}}
{{- end -}}
{{- if .Values.auth.identityLimits -}}
{{- $_ := set $args "identity_limits" "/etc/equipot/limits/limits.toml" -}}
{{- end -}}
{{- $ray := dict "replicas" (int (.Values.replicaCount | default 1)) -}}
{{- if eq .Values.autoscaling.kind "serve" -}}
{{- $ray = dict "replicas" (int .Values.autoscaling.minReplicas) "max_replicas" (int .Values.autoscaling.maxReplicas) "open_edges" (int64 .Values.autoscaling.target) -}}
{{- end -}}
{{- with .Values.rayService.cpusPerRank }}{{ $_ := set $ray "cpus" (int .) }}{{ end -}}
{{- $_ := set $args "ray" $ray -}}
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
grpc_options:
  port: 9000
  grpc_servicer_functions: [equipot.serve.ray_app.replica.mount]
applications:
  - name: equipot
    route_prefix: /
    import_path: equipot.serve.ray_app:build
    args:
      {{- toYaml (mergeOverwrite $args .Values.rayService.extraConfig) | nindent 6 }}
{{- end -}}

{{/* HAProxy before Ray's replicas: the default proxy costs some 8 ms a call. Its files lie where we may write. */}}
{{- define "equipot.rayEnv" -}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_HAPROXY_CONFIG_FILE_LOC, value: /tmp/haproxy/haproxy.cfg}
- {name: RAY_SERVE_HAPROXY_SOCKET_PATH, value: /tmp/haproxy/admin.sock}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_BASE, value: /tmp/haproxy}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_FILE, value: /tmp/haproxy/server-state}
{{ include "equipot.env" . }}
{{- end -}}
