"""What users may set on the pods of a run, in Kubernetes' own terms."""

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from dagger_operator.api.model import ApiModel, Misfit, Rule, list_map, refuse_repeated

Label = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32)]
"""A resource quantity as a string: `500m`, `4`, `16Gi`."""
FreeForm = dict[str, Any]
"""A part of a pod that is passed on unchanged; the API server checks it when the pod is created."""

RESERVED = ("dagger-operator.dev/", "app.kubernetes.io/managed-by")
"""Prefixes of the labels and annotations that identify children; a user's own would break that."""
_RESERVED = f"labels and annotations that start with {' or '.join(RESERVED)} are the operator's own: choose another name"


class TolerationOperator(StrEnum):
    EQUAL = "Equal"
    EXISTS = "Exists"


class TaintEffect(StrEnum):
    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Toleration(ApiModel):
    """Lets a pod be scheduled onto tainted nodes."""

    key: Annotated[str, Field(max_length=316)] | None = None
    """Taint key; without one, operator Exists matches every taint."""
    operator: TolerationOperator | None = None
    """Equal, the default, compares `value`; Exists matches any value."""
    value: Label | None = None
    """Taint value."""
    effect: TaintEffect | None = None
    """Effect of the taint; any effect by default."""
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds that a pod stays on a node after it gets a NoExecute taint; forever by default."""


class LocalReference(ApiModel):
    """An object in the pod's own namespace."""

    name: ObjectName
    """Name of the object."""


class ClaimMount(ApiModel):
    """A PersistentVolumeClaim in the run's namespace, such as one that holds model weights."""

    claim_name: ObjectName
    """Name of the claim."""
    mount_path: Annotated[str, Field(pattern=r"^/[^:]+$", max_length=1024)]
    """Path of the mount in the pod; a `model` below this path is read from there."""
    read_only: bool = True
    """Whether it is mounted read-only."""


_OWN_PREFIX = "DAGGER_"
_OWN_VARIABLES = ("HOME", "JOB_COMPLETION_INDEX", "POD_IP")
"""Variables that the operator sets; Kubernetes accepts each name only once."""
_THE_OPERATORS = f"{', '.join(_OWN_VARIABLES)} and names that start with {_OWN_PREFIX} are the operator's own: choose another name"


class EnvVar(ApiModel):
    """A plain environment variable of a container; secrets are set by other fields."""

    cel: ClassVar[tuple[Rule, ...]] = (Rule(f"!self.name.startsWith('{_OWN_PREFIX}')", _THE_OPERATORS),)

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    value: Annotated[str, Field(max_length=4096)] = ""

    @model_validator(mode="after")
    def _not_the_operators(self) -> Self:
        if self.name.startswith(_OWN_PREFIX):
            raise Misfit("name", self.name, _THE_OPERATORS)
        return self


class EnvSource(ApiModel):
    """Environment variables from another object."""

    secret_ref: LocalReference
    """A Secret in the run's namespace; each key becomes a variable."""


class Resources(ApiModel):
    """Requests and limits of a pod's main container; GPUs are set by other fields."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """What the scheduler reserves; overrides the operator's defaults."""
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    """What the container may not exceed."""


class PodSettings(ApiModel):
    """Scheduling, resources, environment and identity of pods. An edit recreates the pods."""

    cel: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(f"!has(self.{field}) || self.{field}.all(key, !key.startsWith('{prefix}'))", _RESERVED)
            for field in ("labels", "annotations")
            for prefix in RESERVED
        ),
        Rule(f"!has(self.env) || self.env.all(one, !(one.name in {list(_OWN_VARIABLES)}))", _THE_OPERATORS),
    )

    node_selector: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that the pods tolerate."""
    affinity: FreeForm | None = None
    """The pods' `affinity`, as in Kubernetes."""
    topology_spread_constraints: Annotated[list[FreeForm], Field(max_length=8)] = []
    """The pods' `topologySpreadConstraints`, as in Kubernetes."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the pods."""
    scheduler_name: ObjectName | None = None
    """Scheduler to use instead of the cluster's default."""
    image_pull_secrets: Annotated[list[LocalReference], Field(max_length=16, json_schema_extra=list_map("name"))] = []
    """Secrets for pulling images."""
    service_account_name: ObjectName | None = None
    """ServiceAccount of the pods, for example for a cloud's workload identity. Its token is not mounted, with one exception: with Pod
    sandboxes, the account in `rollouts.pod` is the workers' own; its token is mounted into rollout and evaluation pods, and it is bound to
    the Role `dagger-sandbox-worker`, which lets it create pods in the sandbox namespace and run commands in every pod there. So use an
    account there that no other pod runs as."""
    resources: Resources = Resources()
    """Requests and limits of the main container."""
    env: Annotated[list[EnvVar], Field(max_length=32, json_schema_extra=list_map("name"))] = []
    """Additional environment variables of the containers that run this project's commands: all but vLLM's, which has `serving.env`. Do not
    put secrets here: anyone who can read the run can read them."""
    env_from: Annotated[list[EnvSource], Field(max_length=8)] = []
    """Secrets whose keys become environment variables of the same containers, such as HF_TOKEN; `storage.secretRef` takes precedence."""
    labels: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Further labels of the pods."""
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=32)] = {}
    """Further annotations of the pods."""
    shared_memory_mib: Annotated[int, Field(ge=64, le=1048576)] | None = None
    """Size limit of /dev/shm in MiB; defaults to the pod's memory."""
    claims: Annotated[list[ClaimMount], Field(max_length=8, json_schema_extra=list_map("mountPath"))] = []
    """PersistentVolumeClaims that the pods mount."""

    @model_validator(mode="after")
    def _can_be_admitted(self) -> Self:
        for field, names in (("labels", self.labels), ("annotations", self.annotations)):
            for name in names:
                if name.startswith(RESERVED):
                    raise Misfit(field, name, _RESERVED)
        for variable in self.env:
            if variable.name in _OWN_VARIABLES:
                raise Misfit("env", variable.name, _THE_OPERATORS)
        refuse_repeated("env", [variable.name for variable in self.env])
        refuse_repeated("claims", [claim.mount_path for claim in self.claims])
        refuse_repeated("imagePullSecrets", [secret.name for secret in self.image_pull_secrets])
        return self


class SandboxPod(ApiModel):
    """Scheduling and identity of sandbox pods. The settings that confine them cannot be changed."""

    node_selector: Annotated[dict[str, Label], Field(max_length=32)] = {}
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that the pods tolerate."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods, lower than everything else's, so that a full cluster gives up sandboxes first; defaults to the operator's
    setting."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass with stronger isolation, such as gVisor's or Kata's."""
    host_users: bool | None = None
    """False gives each pod its own user namespace, on nodes that support it: root inside the pod is an unprivileged user outside."""
    run_as_user: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """User ID that commands run as; defaults to the image's own."""
    image_pull_secrets: Annotated[list[LocalReference], Field(max_length=16, json_schema_extra=list_map("name"))] = []
    """Secrets in the sandbox namespace for pulling tasks' images."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        refuse_repeated("imagePullSecrets", [secret.name for secret in self.image_pull_secrets])
        return self
