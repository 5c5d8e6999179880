{{/* What no schema can say. */}}
{{- define "equipot.checks" -}}
{{- $v := .Values -}}
{{- $replicas := int (include "equipot.mostReplicas" .) -}}
{{- if and (not $v.models) (not $v.repository.url) }}
{{- fail "models is empty: name at least one model, or set repository.url" }}
{{- end }}
{{- if and $v.models $v.repository.url }}
{{- fail "models and repository.url exclude each other: set one of them" }}
{{- end }}
{{- $names := list }}
{{- range $place, $model := $v.models }}
{{- if has $model.name $names }}
{{- fail (printf "models[%d].name is %q like an earlier one: give each model a name of its own" $place $model.name) }}
{{- end }}
{{- $names = append $names $model.name }}
{{- if and $model.url $model.path }}
{{- fail (printf "models[%d] (%s) has url and path: give one of them" $place $model.name) }}
{{- end }}
{{- if not (or $model.url $model.path) }}
{{- fail (printf "models[%d] (%s) has neither url nor path: say where it lies" $place $model.name) }}
{{- end }}
{{- if and $model.url (not $model.sha256) }}
{{- fail (printf "models[%d] (%s) has a url without sha256: give the archive's checksum or the bundle's digest" $place $model.name) }}
{{- end }}
{{- if and $model.url (eq $v.storage.kind "none") }}
{{- fail (printf "models[%d] (%s) has a url and storage.kind is none: choose emptyDir or a claim to fetch it into" $place $model.name) }}
{{- end }}
{{- if and $model.path (not (hasPrefix "/" $model.path)) (not (has $v.storage.kind (list "existingClaim" "newClaim"))) }}
{{- fail (printf "models[%d] (%s) has path %q in the volume, but storage.kind is %s: choose existingClaim, or an absolute path in the image" $place $model.name $model.path $v.storage.kind) }}
{{- end }}
{{- if and $model.path (hasPrefix "/models/" $model.path) (ne $v.storage.kind "none") }}
{{- fail (printf "models[%d] (%s) has path %q, which the volume at /models hides: set storage.kind to none, or give a path relative to the volume" $place $model.name $model.path) }}
{{- end }}
{{- end }}
{{- if and (eq $v.storage.kind "existingClaim") (not $v.storage.existingClaim) }}
{{- fail "storage.kind is existingClaim: name it in storage.existingClaim" }}
{{- end }}
{{- if has $v.storage.kind (list "existingClaim" "newClaim") }}
{{- $shared := or (gt $replicas 1) (eq $v.mode "leaderWorkerSet") (eq $v.mode "rayService") (and (eq $v.mode "deployment") (not $v.recreate) (gt (int $v.maxSurge) 0)) }}
{{- $writes := include "equipot.fetches" . }}
{{- $many := or (has "ReadWriteMany" $v.storage.accessModes) (and (not $writes) (has "ReadOnlyMany" $v.storage.accessModes)) }}
{{- if and $shared (not $many) }}
{{- fail (printf "storage.accessModes is %s, but several pods mount the models' volume at once (replicas, or the new pod of an update): ReadWriteMany is needed%s; or storage.kind emptyDir, or one replica with recreate" (join ", " $v.storage.accessModes) (ternary "" ", ReadOnlyMany is enough as nothing is fetched" (ne $writes ""))) }}
{{- end }}
{{- end }}
{{- if and (eq $v.autoscaling.kind "serve") (ne $v.mode "rayService") }}
{{- fail (printf "autoscaling.kind is serve, which mode %s does not have: choose hpa or keda" $v.mode) }}
{{- end }}
{{- if and (has $v.autoscaling.kind (list "hpa" "keda")) (eq $v.mode "rayService") }}
{{- fail (printf "autoscaling.kind is %s, but Ray Serve scales by itself in mode rayService: choose serve or none" $v.autoscaling.kind) }}
{{- end }}
{{- if and (ne $v.autoscaling.kind "none") (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) }}
{{- fail (printf "autoscaling.minReplicas is %v, above maxReplicas %v" $v.autoscaling.minReplicas $v.autoscaling.maxReplicas) }}
{{- end }}
{{- if and (eq $v.autoscaling.kind "hpa") (eq (int $v.autoscaling.minReplicas) 0) }}
{{- fail "autoscaling.minReplicas is 0, which a HorizontalPodAutoscaler does not do: give 1 or more, or use keda" }}
{{- end }}
{{- if and (eq (int $v.maxSurge) 0) (eq (int $v.maxUnavailable) 0) (not $v.recreate) }}
{{- fail "maxSurge and maxUnavailable are both 0, so no update could begin: raise one of them" }}
{{- end }}
{{- if and $v.recreate (eq $v.mode "leaderWorkerSet") }}
{{- fail "recreate is for mode deployment: a LeaderWorkerSet replaces its groups one by one, see maxSurge and maxUnavailable" }}
{{- end }}
{{- if eq $v.mode "leaderWorkerSet" }}
{{- $size := int $v.leaderWorkerSet.size }}
{{- if mod (int $v.server.tensorParallel) $size }}
{{- fail (printf "server.tensorParallel is %v, which %d pods (leaderWorkerSet.size) cannot share evenly: make it a multiple" $v.server.tensorParallel $size) }}
{{- end }}
{{- if not $v.leaderWorkerSet.keySecret }}
{{- fail "leaderWorkerSet.keySecret is empty: name a secret whose key `key` is any long random text; pods of a group know each other by it" }}
{{- end }}
{{- end }}
{{- include "equipot.jobsChecks" . }}
{{- if and $v.server.ui $v.tls.mutual }}
{{- fail "server.ui is on, but tls.mutual asks callers for certificates, which the page does not: turn one of them off" }}
{{- end }}
{{- if and $v.server.ui (eq $v.mode "rayService") }}
{{- fail "server.ui is on, which mode rayService does not have: choose another mode" }}
{{- end }}
{{- if and $v.tls.enabled (not $v.tls.existingSecret) (not $v.tls.certManager.issuerName) }}
{{- fail "tls.enabled needs tls.existingSecret, or tls.certManager.issuerName to have a certificate made" }}
{{- end }}
{{- if and $v.tls.mutual (not $v.tls.enabled) }}
{{- fail "tls.mutual needs tls.enabled" }}
{{- end }}
{{- if and $v.auth.tokensSecret (not $v.tls.enabled) (not $v.auth.allowPlaintext) }}
{{- fail "auth.tokensSecret without tls.enabled sends tokens in the clear: enable TLS, or set auth.allowPlaintext where a mesh or a trusted proxy encrypts" }}
{{- end }}
{{- if and $v.ingress.enabled (not $v.ingress.host) }}
{{- fail "ingress.enabled needs ingress.host" }}
{{- end }}
{{- if and $v.ingress.enabled (not $v.ingress.tlsSecret) }}
{{- fail "ingress.enabled needs ingress.tlsSecret: Ingress controllers speak gRPC over TLS alone" }}
{{- end }}
{{- if and $v.grpcRoute.enabled (not $v.grpcRoute.parentRefs) }}
{{- fail "grpcRoute.enabled needs grpcRoute.parentRefs: name the Gateway" }}
{{- end }}
{{- if and (eq $v.mode "rayService") $v.tls.enabled }}
{{- fail "tls.enabled: Ray's proxies listen without TLS; end it at the Gateway or in a mesh in mode rayService" }}
{{- end }}
{{- if and (eq $v.mode "rayService") (eq $v.monitoring.kind "serviceMonitor") }}
{{- fail "monitoring.kind is serviceMonitor: Ray's own metrics are on a port of each pod, use podMonitor in mode rayService" }}
{{- end }}
{{- if and (eq $v.mode "rayService") (or $v.monitoring.rules $v.monitoring.dashboard) }}
{{- fail "monitoring.rules and monitoring.dashboard read the server's own metrics, which replicas under Ray do not have on a fixed port: turn them off in mode rayService" }}
{{- end }}
{{- if and (eq $v.autoscaling.kind "serve") (ne $v.autoscaling.metric "queuedEdges") }}
{{- fail "autoscaling.metric is inFlightRequests, but replicas under Ray are counted by edges: choose queuedEdges" }}
{{- end }}
{{- if and (eq $v.mode "rayService") $v.server.extraArgs }}
{{- fail "server.extraArgs are words of a command line, which mode rayService has not: use rayService.extraConfig" }}
{{- end }}
{{- if and (eq $v.mode "leaderWorkerSet") (ne (len $v.models) 1) }}
{{- fail (printf "mode leaderWorkerSet spreads one model over its pods, %d are given: install a release for each" (len $v.models)) }}
{{- end }}
{{- end -}}
