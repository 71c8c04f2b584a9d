{{- define "dagger-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "dagger-operator.fullname" -}}
{{- $name := include "dagger-operator.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "dagger-operator.serviceAccountName" -}}
{{- default (include "dagger-operator.fullname" .) .Values.serviceAccount.name }}
{{- end }}

{{- define "dagger-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "dagger-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* Labels of an object; call it with (list . "component"). `managed-by` is Helm here: dagger-operator marks objects of runs. */}}
{{- define "dagger-operator.labels" -}}
{{- $root := first . -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{ include "dagger-operator.selectorLabels" $root }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/component: {{ last . }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "dagger-operator.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "dagger-operator.s3Image" -}}
{{- with .Values.s3.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end }}
{{- end }}
{{- end }}

{{- define "dagger-operator.helperImage" -}}
{{- .Values.sandbox.helperImage | default (printf "dagger-operator/sandbox-helper:%s" .Chart.AppVersion) }}
{{- end }}

{{- define "dagger-operator.sandboxPriorityClass" -}}
{{- with .Values.sandbox.priorityClass }}
{{- .name | default (ternary (printf "%s-sandbox" (include "dagger-operator.fullname" $)) "" .create) }}
{{- end }}
{{- end }}

{{- define "dagger-operator.workerImage" -}}
{{- .Values.runs.workerImage | default (printf "dagger-operator/worker:%s" .Chart.AppVersion) }}
{{- end }}

{{- define "dagger-operator.trainerImage" -}}
{{- .Values.runs.trainerImage | default (printf "dagger-operator/trainer:%s" .Chart.AppVersion) }}
{{- end }}

{{- /* The chart's own pods satisfy the restricted pod security standard. */}}
{{- define "dagger-operator.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "dagger-operator.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Selects the namespaces of runs. */}}
{{- define "dagger-operator.runNamespaces" -}}
{{- if .Values.watchNamespaces -}}
matchExpressions:
  - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson .Values.watchNamespaces }}}
{{- else -}}
{}
{{- end }}
{{- end }}

{{- /* Worker pods, as peers of a NetworkPolicy. */}}
{{- define "dagger-operator.workers" -}}
- namespaceSelector:
    {{- include "dagger-operator.runNamespaces" . | nindent 4 }}
  podSelector:
    matchLabels: {app.kubernetes.io/managed-by: dagger-operator}
    matchExpressions:
      - {key: dagger-operator.dev/component, operator: In, values: [rollout, evaluation]}
{{- end }}

{{- /* Rights of the operator in the namespaces of runs. */}}
{{- define "dagger-operator.runRules" -}}
- apiGroups: [dagger-operator.dev]
  resources: [daggerruns]
  verbs: [get, list, watch, delete] # it deletes runs whose ttlSecondsAfterFinished has passed; it never writes a spec
- apiGroups: [dagger-operator.dev]
  resources: [daggerruns/status]
  verbs: [patch]
- apiGroups: [dagger-operator.dev]
  resources: [daggerruns/finalizers]
  verbs: [update] # OwnerReferencesPermissionEnforcement requires it for owner references that block deletion
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [leaderworkerset.x-k8s.io]
  resources: [leaderworkersets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [get, list, create, patch] # it emits its own, and reads why a Job has no pods
- apiGroups: [""]
  resources: [secrets]
  verbs: [get] # the storage's, by the name that a run gives; never listed
{{- end }}

{{- define "dagger-operator.s3SecretName" -}}
{{- .Values.s3.existingSecret | default (printf "%s-s3" (include "dagger-operator.fullname" .)) }}
{{- end }}

{{- /* Fails if an API of the Prometheus Operator is missing; call it with (list . "ServiceMonitor" "value"). */}}
{{- define "dagger-operator.needsMonitoring" -}}
{{- $root := first . }}
{{- if not ($root.Capabilities.APIVersions.Has (printf "monitoring.coreos.com/v1/%s" (index . 1))) }}
{{- fail (printf "%s needs the API monitoring.coreos.com/v1 %s, which this cluster does not serve: install the Prometheus Operator first, or set it to false" (last .) (index . 1)) }}
{{- end }}
{{- end }}

{{- /* Replaces `spec:` in the copied CRD. */}}
{{- define "dagger-operator.crdMetadata" }}
  labels:
    {{- include "dagger-operator.labels" (list . "crd") | nindent 4 }}
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
spec:
{{ end }}

{{- /* Checks that the schema of the values cannot express. */}}
{{- define "dagger-operator.check" -}}
{{- if and .Values.sandbox.enabled (has .Values.sandbox.namespace (append .Values.watchNamespaces .Release.Namespace)) }}
{{- fail (printf "sandbox.namespace %q holds the operator or runs: untrusted code gets a namespace of its own, so write another name" .Values.sandbox.namespace) }}
{{- end }}
{{- if and .Values.podDisruptionBudget.enabled (lt (int .Values.replicas) 2) }}
{{- fail "podDisruptionBudget.enabled with one replica would block every drain of its node: set replicas to 2 or more" }}
{{- end }}
{{- if and .Values.s3.existingSecret .Values.s3.copySecretTo }}
{{- fail "s3.copySecretTo copies the Secret that the chart makes: leave it out beside s3.existingSecret, and copy your own" }}
{{- end }}
{{- if .Values.s3.enabled }}
{{- with .Values.s3.image }}
{{- $number := "(0|[1-9][0-9]{0,8})" }}
{{- $suffix := "(0|[1-9][0-9]{0,8}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)" }}
{{- if regexMatch (printf "^v?%s([.]%s){1,2}(-%s([.]%s)*)?$" $number $number $suffix $suffix) .tag }}
{{- if semverCompare "<1.8.0-0" (.tag | trimPrefix "v") }}
{{- fail (printf "s3.image.tag %q loses conditional writes, on which every run rests: write v1.8.0 or newer" .tag) }}
{{- end }}
{{- else if not .digest }}
{{- fail (printf "s3.image.tag %q does not tell its version, and before v1.8.0 conditional writes are lost, on which every run rests: write a version, or s3.image.digest of an image that is new enough" .tag) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
