/** Moved to client/service.js; this path is kept for pages that already import it. */

export * from "./client/service.js";
