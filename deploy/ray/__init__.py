"""The images server as a Ray Serve application: many machines, one engine a replica."""
