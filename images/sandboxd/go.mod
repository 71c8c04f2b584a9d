module dagger-operator.dev/sandboxd

go 1.19
