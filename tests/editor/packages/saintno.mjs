// @saintno/comfyui-sdk: node saintno.mjs BASE_URL PROMPT_JSON NODE_OF_THE_PICTURE FOLDER
import { readFileSync, writeFileSync } from "node:fs";
import { CallWrapper, ComfyApi, PromptBuilder } from "@saintno/comfyui-sdk";

const [base, file, node, folder] = process.argv.slice(2);
const api = await new ComfyApi(base).init().waitForReady();
const workflow = new PromptBuilder(JSON.parse(readFileSync(file, "utf8")), [], ["picture"]).setRawOutputNode("picture", node);
const found = await new Promise((resolve, reject) =>
  new CallWrapper(api, workflow).onFinished(resolve).onFailed(reject).run());
const [picture] = found.picture.images;
writeFileSync(`${folder}/picture`, Buffer.from(await (await api.getImage(picture)).arrayBuffer()));
const learned = Object.values(found._raw).flatMap((output) => output.files ?? []);
for (const one of learned) {
  writeFileSync(`${folder}/${one.filename}`, Buffer.from(await (await fetch(api.getPathImage(one))).arrayBuffer()));
}
process.exit(0);
