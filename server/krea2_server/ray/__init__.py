"""The images server as a Ray Serve application: many machines, one engine a replica."""

from krea2_srt.bytecode import write_bytecode

# Here, since Ray starts the processes: what a replica runs of ours begins with this import.
write_bytecode()
