#!/bin/sh
# Prints the rules and alerts of deploy/prometheus as an object of the Prometheus operator:
#   deploy/kubernetes/rules.sh | kubectl apply -n krea2 -f -
set -eu
echo 'apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: krea2
spec:'
sed 's/^/  /' "$(dirname "$0")/../prometheus/alerts.yml"
