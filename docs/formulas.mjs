// Formulas to HTML and MathML: reads [{tex, display}, ...] as JSON, writes [{html} or {error}, ...].
import katex from "katex";
import { readFileSync, writeFileSync } from "node:fs";

const set = ({ tex, display }) => {
  try {
    return { html: katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: "error" }) };
  } catch (error) {
    return { error: error.message };
  }
};
const formulas = JSON.parse(readFileSync(0, "utf8"));
writeFileSync(1, JSON.stringify(formulas.map(set)));
