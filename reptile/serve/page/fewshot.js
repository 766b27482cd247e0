/** Moved to client/fewshot.js; this path is kept for pages that already import it. */

export * from "./client/fewshot.js";
