// @stable-canvas/comfyui-client: node stable-canvas.mjs BASE_URL PROMPT_JSON FOLDER
import { readFileSync, writeFileSync } from "node:fs";
import { Client } from "@stable-canvas/comfyui-client";
import WebSocket from "ws";

const [base, file, folder] = process.argv.slice(2);
const client = new Client({ api_host: new URL(base).host, WebSocket, fetch });
await client.connect();
// It has its result with the last node's, a moment before the job is in the history.
async function history(id) {
  for (;;) {
    const entries = await (await client.fetchApi(`/history/${id}`)).json();
    if (entries[id]) return entries[id];
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

const found = await client.enqueue(JSON.parse(readFileSync(file, "utf8")));
for (const [number, { type, data }] of found.images.entries()) {
  const bytes = type === "buff" ? data : await (await fetch(data)).arrayBuffer();
  writeFileSync(`${folder}/picture-${number}`, Buffer.from(bytes));
}
const outputs = Object.values((await history(found.prompt_id)).outputs);
for (const one of outputs.flatMap((output) => output.files ?? [])) {
  const reply = await client.fetchApi(`/view?${new URLSearchParams(one)}`);
  writeFileSync(`${folder}/${one.filename}`, Buffer.from(await reply.arrayBuffer()));
}
client.close();
process.exit(0);
