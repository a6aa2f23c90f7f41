"""JAX's coordination service as this process sees it: the only private JAX API in this codebase.

`jax.distributed.initialize` is public and starts the service. What it leaves behind has no public
name: this process's number and the number of processes without a question to the devices
(`jax.process_count` starts them), the address of process 0, and a client with a key-value store and
barriers that use no device and so still answer when a device hangs. Checked with jax 0.11.2;
`state` is one object for the life of a process.
"""

from jax._src import distributed

State = distributed.State
state: State = distributed.global_state
