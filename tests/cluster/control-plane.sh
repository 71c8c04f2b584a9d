# Functions that run etcd, kube-apiserver and kube-controller-manager, for `node` and `control-plane`.
# shellcheck shell=bash

# certificates FOLDER ADDRESS SERVICE_ADDRESS: creates a CA for this cluster, and the certificates that it signs.
certificates() (
  umask 077
  mkdir -p "$1" && cd "$1"
  key() { openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$1.key"; }
  sign() { # name subject subjectAltName
    key "$1"
    openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out "$1.crt" \
      -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=clientAuth,serverAuth\n' "${3:-DNS:none}") 2>/dev/null
  }
  key ca
  openssl req -x509 -new -key ca.key -subj /CN=dagger-test -days 30 -out ca.crt
  key accounts
  openssl pkey -in accounts.key -pubout -out accounts.pub
  sign apiserver /CN=kube-apiserver "DNS:kubernetes.default.svc,DNS:localhost,IP:$2,IP:$3"
  sign apiserver-to-kubelet /O=system:masters/CN=kube-apiserver
  sign admin /O=system:masters/CN=admin
  sign controllers /CN=system:kube-controller-manager
  sign scheduler /CN=system:kube-scheduler
  sign node /O=system:nodes/CN=system:node:node-1 "DNS:node-1,IP:$2"
  sign proxy /CN=system:kube-proxy
  for user in admin controllers scheduler node proxy; do kubeconfig "$user" "$2" >"$user.conf"; done
)

kubeconfig() { # user address; run in the folder of the certificates
  cat <<Y
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://$2:6443", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 "$1.crt"), client-key-data: $(base64 -w0 "$1.key")}}]
contexts: [{name: test, context: {cluster: test, user: $1}}]
current-context: test
Y
}

# control_plane PKI DATA ADDRESS SERVICES [FLAG OF THE CONTROLLER MANAGER...]; needs $ETCD, $LOG, and the Kubernetes programs on the PATH.
control_plane() {
  local pki=$1 data=$2 address=$3 services=$4 && shift 4
  # A cluster that lives for minutes needs no fsync.
  keep etcd "$ETCD" --data-dir="$data" --unsafe-no-fsync --listen-client-urls="http://$address:2379" \
    --advertise-client-urls="http://$address:2379" --listen-peer-urls="http://$address:2380" \
    --initial-advertise-peer-urls="http://$address:2380" --initial-cluster="default=http://$address:2380" --log-level=warn
  keep apiserver kube-apiserver --etcd-servers="http://$address:2379" --bind-address="$address" --advertise-address="$address" \
    --endpoint-reconciler-type="${ENDPOINTS:-lease}" --service-cluster-ip-range="$services" --allow-privileged \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --client-ca-file="$pki/ca.crt" \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$pki/accounts.pub" \
    --service-account-signing-key-file="$pki/accounts.key" --kubelet-preferred-address-types=InternalIP \
    --kubelet-client-certificate="$pki/apiserver-to-kubelet.crt" --kubelet-client-key="$pki/apiserver-to-kubelet.key" \
    --kubelet-certificate-authority="$pki/ca.crt"
  patiently 90 kubectl --kubeconfig="$pki/admin.conf" get --raw /readyz || fail "the API server does not answer: see its log in $LOG"
  keep controllers kube-controller-manager --kubeconfig="$pki/controllers.conf" --leader-elect=false --bind-address="$address" \
    --use-service-account-credentials --service-account-private-key-file="$pki/accounts.key" --root-ca-file="$pki/ca.crt" "$@"
}
