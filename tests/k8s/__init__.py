"""k8s/ without a cluster: what is built, its schemas, the operator's rules and our own."""
