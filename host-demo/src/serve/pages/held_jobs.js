// An extension of ComfyUI's editor: jobs that an earlier server left in the queue run once somebody says so.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

async function countHeld() {
  const reply = await api.fetchApi("/jobs?status=pending");
  const { jobs } = await reply.json();
  return jobs.filter(job => job.paused).length;
}

const tell = (summary, more) => app.extensionManager.toast.add({ severity: "info", summary, life: 10000, ...more });
const counted = count => count === 1 ? "1 job" : `${count} jobs`;

async function run() {
  const count = await countHeld();
  if (count === 0) return tell("No jobs are left over");
  const reply = await api.fetchApi("/queue", {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ resume: true }) });
  if (reply.ok) tell(`${counted(count)} left over: now in the queue`);
  else tell("The jobs left over do not run", { severity: "error", detail: (await reply.json()).error.message });
}

const label = "Run jobs left over", icon = "pi pi-play";
const count = await countHeld();
app.registerExtension({
  name: "Conceptloom.HeldJobs",
  commands: [{ id: "Conceptloom.RunHeldJobs", label, icon, function: run }],
  menuCommands: [{ path: ["Conceptloom"], commands: ["Conceptloom.RunHeldJobs"] }],
  // A button beside Run, for as long as the page is open.
  actionBarButtons: count > 0 ? [{ icon, label, tooltip: "They waited when the server stopped", onClick: run }] : [],
  setup() {
    if (count === 0) return;
    const detail = `Press «${label}» at the top to go on, or remove them from the queue.`;
    tell(`${counted(count)} waited when the server stopped`, { detail, life: 60000 });
  },
});
