"""A SLURM of several nodes on one machine: each node has network, hostname and processes of its own.

In: root on Debian or Ubuntu with `PACKAGES`. Out: a running cluster whose configuration, state, keys and logs lie in one
directory; nothing in /etc is touched but /etc/netns, where a network namespace finds its own /etc/hosts. All of its
processes end with the one that brought it up, whatever ends that.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "ip": "iproute2"}
NETWORK = "10.77.0"  # node i is .i, this machine .254
BRIDGE = "slurmtestbr"
CONTROLLER_PORT, NODE_PORT = 16817, 16818
CPUS, GPUS = 16, 8
BRING_UP_S = 120.0


def why_not() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})
    if missing:
        return f"needs the Debian packages {', '.join(missing)}: bash tools/install_slurm.sh"
    # util-linux, which every Debian has.
    probe = subprocess.run(
        ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "--uts", "--pid", "--fork", "true"],
        capture_output=True,
        check=False,
    )
    return None if probe.returncode == 0 else "this machine allows no namespaces"


class Cluster:
    """The cluster in `root`, with nodes node1, node2, ..."""

    def __init__(self, root: Path, num_nodes: int = 4) -> None:
        self.root, self.num_nodes = root, num_nodes
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's programs need to find this cluster, and no other."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    @property
    def unshared(self) -> Path:
        """A directory of which node2 sees one of its own."""
        return self.root / "unshared"

    def start(self) -> None:
        """Bring everything up, and wait until all nodes are idle."""
        self.stop()
        for name in ("state", "spool", "log", "dev", "unshared"):
            (self.root / name).mkdir(parents=True)
        self._write_configuration()
        os.environ |= self.environment
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        self._daemon("munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *self._munge_files())
        wait_for((self.root / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for number in range(1, self.num_nodes + 1):
            self.start_node(f"node{number}")
        wait_for(lambda: self.node_states() == ["idle"] * self.num_nodes, "all nodes to be idle")

    def start_node(self, name: str) -> None:
        """Start a node, with an address and a process tree of its own."""
        number = int(name.removeprefix("node"))
        veth = f"veth-{name}"
        remove_network(name)
        netns = Path("/etc/netns") / name
        netns.mkdir(parents=True, exist_ok=True)
        (netns / "hosts").write_text(self._hosts())
        run("ip", "netns", "add", name)
        # A fixed hardware address: others may still remember that of the node before it was started again.
        address = f"02:00:00:00:77:{number:02x}"
        run("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "address", address, "netns", name)
        run("ip", "link", "set", veth, "master", BRIDGE, "up")
        for words in (("link", "set", "lo", "up"), ("addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")):
            run("ip", "-n", name, *words)
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "route", "add", "default", "via", f"{NETWORK}.254")
        # The shell is the node's first process: it reaps orphans, and when it goes everything on the node does.
        hide = f"mount -t tmpfs none {self.unshared}; " if name == "node2" else ""
        first = ("bash", "-c", f'{hide}hostname "$0"; slurmd -D -N "$0" & wait $!', name)
        apart = ("unshare", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.nodes[name] = self._spawn(name, "ip", "netns", "exec", name, *apart, *first)

    def kill_node(self, name: str) -> None:
        """Everything on the node is gone at once, nothing answers there any more, and the controller is told.

        It would notice after SlurmdTimeout. A short one also loses nodes that are merely slow to answer.
        """
        node = self.nodes.pop(name)
        node.kill()
        node.wait()
        run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def node_states(self) -> list[str]:
        """The state of every node; empty where the controller does not answer."""
        asked = subprocess.run(
            ["sinfo", "-h", "-N", "--partition=gpu", "-o", "%T"], capture_output=True, text=True, check=False
        )
        return asked.stdout.split()

    def stop(self) -> None:
        """End all that was started, and remove what it left."""
        for process in (*self.nodes.values(), *self.daemons):
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.nodes.clear()
        self.daemons.clear()
        for number in range(1, self.num_nodes + 1):
            remove_network(f"node{number}")
        run("ip", "link", "del", BRIDGE, check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def log_of(self, daemon: str) -> str:
        """What a daemon has said."""
        return (self.root / "log" / f"{daemon}.log").read_text()

    def _daemon(self, name: str, *arguments: str) -> None:
        self.daemons.append(self._spawn(name, name, *arguments))

    def _spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        # setpriv has the kernel kill the process with the thread that started it; the rest of a node goes with `unshare`.
        words = ["setpriv", "--pdeathsig=KILL", *command]
        with (self.root / "log" / f"{name}.log").open("ab") as log:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _munge_files(self) -> list[str]:
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = {"key-file": "munge.key", "pid-file": "munged.pid", "log-file": "log/munged", "seed-file": "munge.seed"}
        return [f"--{option}={self.root / name}" for option, name in names.items()]

    def _hosts(self) -> str:
        nodes = "".join(f"{NETWORK}.{number} node{number}\n" for number in range(1, self.num_nodes + 1))
        return f"127.0.0.1 localhost\n{NETWORK}.254 {socket.gethostname()}\n{nodes}"

    def _write_configuration(self) -> None:
        for number in range(GPUS):
            os.mknod(self.root / f"dev/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))  # /dev/null stands for a GPU
        nodes = "".join(
            f"NodeName=node{number} NodeAddr={NETWORK}.{number} Port={NODE_PORT} CPUs={CPUS} RealMemory=64000 "
            f"Gres=gpu:h100:{GPUS}\n"
            for number in range(1, self.num_nodes + 1)
        )
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(root=self.root, host=socket.gethostname()) + nodes)
        (self.root / "gres.conf").write_text(f"Name=gpu Type=h100 File={self.root}/dev/gpu[0-{GPUS - 1}]\n")
        # Else slurmd looks for cgroups, and for systemd behind them.
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


# More CPUs than the machine has (config_overrides), no cgroups, no accounting. Schedulers look often; what gives up on
# daemons, jobs and signals waits long, as a busy machine is slow to answer.
CONFIGURATION = f"""\
ClusterName=test
SlurmctldHost={{host}}({NETWORK}.254)
SlurmctldPort={CONTROLLER_PORT}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={{root}}/munge.socket
CredType=cred/munge
StateSaveLocation={{root}}/state
SlurmdSpoolDir={{root}}/spool/%n
SlurmctldPidFile={{root}}/slurmctld.pid
SlurmdPidFile={{root}}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/none
SlurmdTimeout=300
MessageTimeout=60
BatchStartTimeout=300
UnkillableStepTimeout=300
KillWait=300
MinJobAge=3600
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES DefaultTime=00:30:00 MaxTime=1-00:00:00 DefMemPerCPU=1000 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=00:30:00 DefMemPerCPU=1000 State=UP
PartitionName=billed Nodes=ALL AllowAccounts=physics DefaultTime=00:30:00 DefMemPerCPU=1000 State=UP
"""


def run(*command: str, check: bool = True) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def remove_network(name: str) -> None:
    """Remove a node's network, where it has one."""
    run("ip", "netns", "del", name, check=False)
    run("ip", "link", "del", f"veth-{name}", check=False)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def kill_ranks(job: str) -> None:
    """Kill a job's ranks, which wait for one that is gone: what SLURM does by itself, after `KillWait`."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            variables = environment.read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={job}".encode() in variables and any(
                name.startswith(b"LOCAL_RANK=") for name in variables
            ):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def wait_for(condition, what: str, timeout_s: float = BRING_UP_S, every_s: float = 0.1) -> None:
    """Wait until `condition()` is true, asked every `every_s`; the limit is one that only a hang reaches."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(every_s)


def job_details(job: str) -> dict[str, str]:
    """What `scontrol` knows of a job: `JobState`, `Restarts`, ...

    Asked again where there is none: a task of an array is lost for a moment when it becomes a job by itself.
    """
    said = ""

    def is_found() -> bool:
        nonlocal said
        said = run("scontrol", "show", "job", job, check=False)
        return "JobState=" in said

    wait_for(is_found, f"job {job} to be known")
    return dict(re.findall(r"(\S+?)=(\S*)", said))


if __name__ == "__main__":
    reason = why_not()
    print(f"tests/slurm: not run: SLURM {reason}" if reason else "tests/slurm: a real SLURM can be brought up here")
