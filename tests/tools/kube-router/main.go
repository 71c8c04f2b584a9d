// The network policy controller of kube-router alone, which turns NetworkPolicies into rules of iptables: kube-router with all of its
// controllers (routing, service proxy) takes BGP and Docker with it, and three times as long to build.
package main

import (
	"flag"
	"log"
	"sync"
	"time"

	"github.com/cloudnativelabs/kube-router/v2/pkg/controllers/netpol"
	"github.com/cloudnativelabs/kube-router/v2/pkg/healthcheck"
	"github.com/cloudnativelabs/kube-router/v2/pkg/options"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "as whom it reads pods, namespaces, policies and its node")
	config := options.NewKubeRouterConfig()
	config.EnableIPv4 = true
	flag.StringVar(&config.HostnameOverride, "node", "", "name of the node that it runs on")
	flag.StringVar(&config.ClusterIPCIDRs[0], "services", config.ClusterIPCIDRs[0], "addresses of Services")
	flag.Parse()

	rest := must(clientcmd.BuildConfigFromFlags("", *kubeconfig))
	client := must(kubernetes.NewForConfig(rest))
	factory := informers.NewSharedInformerFactory(client, 0)
	pods := factory.Core().V1().Pods().Informer()
	namespaces := factory.Core().V1().Namespaces().Informer()
	policies := factory.Networking().V1().NetworkPolicies().Informer()
	forever := make(chan struct{})
	factory.Start(forever)
	cache.WaitForCacheSync(forever, pods.HasSynced, namespaces.HasSynced, policies.HasSynced)

	tables, sets, err := netpol.NewIPTablesHandlers(config)
	check(err)
	var mutex sync.Mutex
	controller := must(netpol.NewNetworkPolicyController(client, config, pods, policies, namespaces, &mutex, tables, sets))
	must(pods.AddEventHandler(controller.PodEventHandler))
	must(namespaces.AddEventHandler(controller.NamespaceEventHandler))
	must(policies.AddEventHandler(controller.NetworkPolicyEventHandler))

	heartbeats := make(chan *healthcheck.ControllerHeartbeat)
	go func() {
		for range heartbeats {
		}
	}()
	var running sync.WaitGroup
	running.Add(1)
	controller.Run(heartbeats, forever, &running)
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

func check(err error) {
	if err != nil {
		time.Sleep(time.Second) // whoever starts it again need not do so at once
		log.Fatal(err)
	}
}
