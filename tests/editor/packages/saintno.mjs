// @saintno/comfyui-sdk: node saintno.mjs BASE_URL PROMPT_JSON NODE_OF_THE_PICTURE NODE_OF_WHAT_IS_LEARNED FOLDER
import { readFileSync, writeFileSync } from "node:fs";
import { CallWrapper, ComfyApi, PromptBuilder } from "@saintno/comfyui-sdk";

const [base, file, picture, learned, folder] = process.argv.slice(2);
const api = await new ComfyApi(base).init().waitForReady();
const workflow = new PromptBuilder(JSON.parse(readFileSync(file, "utf8")), [], ["picture", "learned"])
  .setRawOutputNode("picture", picture)
  .setRawOutputNode("learned", learned);
const found = await new Promise((resolve, reject) =>
  new CallWrapper(api, workflow).onFinished(resolve).onFailed(reject).run());
const [painted] = found.picture.images;
writeFileSync(`${folder}/picture`, Buffer.from(await (await api.getImage(painted)).arrayBuffer()));
for (const one of found.learned.files) {
  writeFileSync(`${folder}/${one.filename}`, Buffer.from(await (await fetch(api.getPathImage(one))).arrayBuffer()));
}
process.exit(0);
