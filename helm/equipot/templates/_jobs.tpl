{{/* What no schema can say of jobs. */}}
{{- define "equipot.jobsChecks" -}}
{{- $v := .Values -}}
{{- $replicas := int (include "equipot.mostReplicas" .) -}}
{{- if $v.jobs.enabled }}
{{- if eq $v.mode "rayService" }}
{{- fail "jobs.enabled is on, which mode rayService does not have: its next replica starts before the last has ended, and one server alone may have the jobs' folder; choose mode deployment" }}
{{- end }}
{{- if ne $v.autoscaling.kind "none" }}
{{- fail (printf "jobs.enabled is on and autoscaling.kind is %s, but one server alone may have the jobs' folder: set autoscaling.kind to none, or install a release for jobs beside the one that scales" $v.autoscaling.kind) }}
{{- end }}
{{- if or (kindIs "invalid" $v.replicaCount) (gt $replicas 1) }}
{{- fail "jobs.enabled needs replicaCount 1 (or 0): a second server could not have the jobs' folder, and its callers would find no job; install a release for each server that keeps jobs" }}
{{- end }}
{{- if and (eq $v.mode "deployment") (not $v.recreate) }}
{{- fail "jobs.enabled needs recreate: the new pod of an update could not have the jobs' folder before the old one has ended" }}
{{- end }}
{{- if and (eq $v.mode "leaderWorkerSet") (ne (toString $v.maxSurge) "0") }}
{{- fail "jobs.enabled needs maxSurge 0 and maxUnavailable 1: the new group of an update could not have the jobs' folder before the old one has ended" }}
{{- end }}
{{- if and (eq $v.jobs.kind "existingClaim") (not $v.jobs.existingClaim) }}
{{- fail "jobs.kind is existingClaim: name it in jobs.existingClaim" }}
{{- end }}
{{- range $v.server.extraArgs }}
{{- if or (hasPrefix "--config" .) (hasPrefix "--jobs" .) }}
{{- fail (printf "server.extraArgs has %s, which jobs.enabled gives itself: leave one of them out" .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The claim that jobs are kept on. */}}
{{- define "equipot.jobsClaim" -}}
{{- ternary .Values.jobs.existingClaim (printf "%s-jobs" (include "equipot.fullname" .)) (eq .Values.jobs.kind "existingClaim") -}}
{{- end -}}

{{/* How jobs are kept, as a file of `equipot serve --config`. The volume's root belongs to whom the platform says. */}}
{{- define "equipot.jobsSettings" -}}
[jobs]
folder = "/jobs/store"
keep_days = {{ .Values.jobs.keepDays }}
# Of the volume: the rest is for what SQLite writes ahead.
most_bytes = {{ div (mul (int64 .Values.jobs.sizeGi) 1073741824 4) 5 }}
{{- end -}}
