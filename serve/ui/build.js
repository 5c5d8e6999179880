// Builds the page into the Python package, with the licences of what it contains.

import { build } from "esbuild";
import { copyFile, mkdir, readFile, writeFile } from "node:fs/promises";

const to = process.argv[2] ?? "../equipot/serve/ui/static";
await mkdir(to, { recursive: true });
await build({
  entryPoints: { app: "src/main.js" },
  outdir: to,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "none",
});
for (const name of ["index.html", "icon.svg"]) await copyFile(`src/${name}`, `${to}/${name}`);
await build({ entryPoints: ["src/app.css"], outdir: to, minify: true });

const { dependencies } = JSON.parse(await readFile("package.json", "utf8"));
let text = "What app.js contains besides equipot's own code.\n";
for (const name of Object.keys(dependencies).sort()) {
  const about = JSON.parse(await readFile(`node_modules/${name}/package.json`, "utf8"));
  const licence = await readFile(`node_modules/${name}/LICENSE`, "utf8");
  text += `\n${"-".repeat(78)}\n${name} ${about.version} (${about.license})\n\n${licence.trim()}\n`;
}
await writeFile(`${to}/THIRD_PARTY.txt`, text);
